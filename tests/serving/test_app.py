import io

import numpy as np
import pytest
import requests
from PIL import Image

from tests.serving.conftest import mask_png, photo


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_mask_is_the_bytes_that_the_predictor_gives(store, server, kind):
    body = photo(91, 64, 1, kind)
    answer = server.segment(body, Accept="image/png")
    assert (answer.status_code, answer.headers["content-type"], answer.headers["model-version"]) == (200, "image/png", "1")
    assert answer.content == mask_png(store.predictor("1"), body)
    print(np.unique(Image.open(io.BytesIO(answer.content))))
    print(server.segment(body, Accept="application/json").text, requests.get(server.url+"/model").text, requests.get(server.url+"/healthz").text, requests.get(server.url).text)
    print(server.text())
