from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segmentation.data.images import mask_image
from segmentation.data.voc import VocFolder


@pytest.fixture
def make_raw(tmp_path):
    """Writes a tiny raw folder in VOC layout: three classes, `train` and `val` of the given sizes."""

    def make(train: int = 4, val: int = 3, root: Path = tmp_path / "data" / "raw") -> VocFolder:
        folder = VocFolder(root)
        generator = np.random.default_rng(0)
        for path in (folder.photo("x"), folder.mask("x"), folder.split_file("x")):
            path.parent.mkdir(parents=True, exist_ok=True)
        folder.classes_file.write_text("background\ncat\ndog\n")
        for split, count in (("train", train), ("val", val)):
            ids = [f"{split}{k}" for k in range(count)]
            folder.split_file(split).write_text("".join(f"{name}\n" for name in ids))
            for k, name in enumerate(ids):
                height, width = 60 + 4 * k, 90 - 5 * (k % 12)
                mask = np.zeros((height, width), np.uint8)
                mask[10:40, 15:50] = 1 + k % 2
                mask[8:10, 15:50] = 255
                photo = generator.integers(0, 80, (height, width, 3), dtype=np.uint8)
                photo[..., 0] += 120 * (mask == 1).astype(np.uint8)
                photo[..., 1] += 120 * (mask == 2).astype(np.uint8)
                Image.fromarray(photo).save(folder.photo(name), quality=95)
                mask_image(mask).save(folder.mask(name))
        return folder

    return make
