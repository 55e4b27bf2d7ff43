"""Which palettes of masks are refused, and which pass."""

import pytest

from segmentation.data.palettes import Painted, Reference, conflicts, find_reference
from segmentation.data.voc import CLASSES, VOID, VocFolder
from segmentation.errors import PipelineError

BLACK, RED, GREEN, BLUE, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
BORDER, AEROPLANE, CAT, DOG = (224, 224, 192), (128, 0, 0), (64, 0, 0), (64, 0, 128)


@pytest.fixture
def voc(tmp_path) -> Reference:
    reference = find_reference(VocFolder(tmp_path), CLASSES)
    assert reference is not None
    return reference


def painted(*masks: tuple[str, dict]) -> list[Painted]:
    """Masks a, b, c, …, each of the palette of that name, with these colors of its labels."""
    return [Painted("abcdef"[place], palette, colors) for place, (palette, colors) in enumerate(masks)]


def test_another_tools_consistent_palette_passes_with_whatever_reference(voc):
    own = {0: BLACK, 1: (250, 50, 83), 2: (51, 221, 255), VOID: WHITE}
    masks = painted(("p", own), ("p", {0: BLACK, 2: (51, 221, 255)}), ("longer", own))
    assert conflicts(masks, None) == conflicts(masks, voc) == {}


def test_a_grey_palette_says_nothing_beyond_the_labels(voc):
    grey = {label: (label, label, label) for label in (0, 1, 128, VOID)}  # 128 is the grey of VOC's car
    masks = painted(("grey", grey), ("p", {0: BLACK, 1: RED}), ("p", {0: BLACK, 1: RED}))
    assert conflicts(masks, None) == conflicts(masks, voc) == {}


def grey(*ids: int) -> dict:
    """The palette that a PNG optimizer makes of a grey mask: the ids that it shows, one after the other."""
    return {label: (identifier,) * 3 for label, identifier in enumerate(ids)}


@pytest.mark.parametrize(
    ("colors", "words"),
    [
        (grey(0, 2), "label 1 has the grey 2 2 2, which is label 2 in a grey mask"),
        (grey(1, 0), "label 0 has the grey 1 1 1, which is label 1 in a grey mask"),  # Pillow's quantize
        (grey(0, 1, VOID), "label 2 has the grey 255 255 255, which is label 255 in a grey mask"),
        (grey(0, 15), None),  # no id of three classes: greys as a tool paints them
        ({0: BLACK, 1: WHITE}, None),
        ({0: BLACK, 1: (1, 1, 1), VOID: BLACK}, None),
    ],
)
def test_a_renumbered_grey_mask_is_told_by_the_grey_of_another_id(colors, words):
    assert conflicts(painted(("p", colors)), None, range(3)) == ({"a": words} if words else {})


def test_the_greys_of_a_palette_that_has_colors_are_colors():
    wall = {0: BLACK, 1: (2, 2, 2)}
    assert conflicts(painted(("p", wall), ("p", {2: (180, 120, 120)})), None, range(150)) == {}


def test_white_is_void_where_grey_masks_of_the_set_have_it():
    masks = painted(("p", {0: BLACK, 1: WHITE}))
    assert conflicts(masks, None, {0, 1, 2}) == {}
    assert list(conflicts(masks, None, {0, 1, 2, VOID})) == ["a"]


def test_vocs_names_are_known_in_other_tools_spelling(voc, tmp_path):
    names = ["_background_", *(name.title() for name in CLASSES[1:-1]), "tv/monitor"]
    assert find_reference(VocFolder(tmp_path), names) == voc
    assert find_reference(VocFolder(tmp_path), [*CLASSES[:12], "hound", *CLASSES[13:]]) is None


@pytest.mark.parametrize(
    ("colors", "words"),
    [
        ({0: BLACK, 8: DOG, 12: CAT}, "label 8 has color 64 0 128, which is label 12 in VOC's palette"),
        ({0: BLACK, 1: CAT}, "label 1 has color 64 0 0, which is label 8 in VOC's palette"),
        ({0: BLACK, 1: BORDER, 8: CAT}, "label 1 has color 224 224 192, which is label 255 in VOC's palette"),
        ({0: CAT, 1: BLACK}, "label 0 has color 64 0 0, which is label 8 in VOC's palette"),
    ],
)
def test_with_vocs_names_vocs_colors_stand_for_vocs_classes(voc, colors, words):
    masks = painted(("voc", {0: BLACK, 8: CAT, VOID: BORDER}), ("other", colors))
    assert conflicts(masks, voc) == {"b": words}


def test_without_vocs_names_vocs_colors_stand_for_nothing(tmp_path):
    assert find_reference(VocFolder(tmp_path), ["background", "cat", "dog"]) is None
    assert conflicts(painted(("p", {0: BLACK, 1: CAT}), ("p", {0: BLACK, 2: AEROPLANE})), None) == {}


def test_a_color_at_two_labels_is_named_in_the_rarer_masks_wherever_they_stand():
    swapped = ("swapped", {0: BLACK, 1: GREEN, 2: RED})
    right = ("right", {0: BLACK, 1: RED, 2: GREEN})
    assert conflicts(painted(swapped, right, right), None) == {"a": "color 0 255 0 is label 1, but label 2 in b"}
    assert conflicts(painted(right, swapped), None) == {"b": "color 0 255 0 is label 1, but label 2 in a"}
    hole = ("hole", {0: BLACK, 2: RED})
    assert conflicts(painted(right, ("short", {0: BLACK, 1: RED}), hole), None) == {
        "c": "color 255 0 0 is label 2, but label 1 in a"
    }


def test_a_label_with_two_colors_is_what_is_left_of_masks_of_one_object_each():
    masks = painted(("cat", {0: BLACK, 1: RED}), ("dog", {0: BLACK, 1: GREEN}), ("cat", {0: BLACK, 1: RED}))
    assert conflicts(masks, None) == {"b": "label 1 has color 0 255 0, but color 255 0 0 in a"}


def test_a_renumbered_mask_of_foreign_colors_is_found_with_vocs_names_too(voc):
    masks = painted(("p", {0: BLACK, 1: RED, 2: BLUE}), ("p", {0: BLACK, 1: RED}), ("q", {0: BLACK, 1: BLUE}))
    assert conflicts(masks, voc) == {"c": "color 0 0 255 is label 1, but label 2 in a"}


def test_one_palette_may_have_a_color_twice():
    padded = [("p", {0: BLACK, 1: RED, VOID: BLACK}), ("p", {1: RED, VOID: BLACK}), ("p", {0: BLACK, 1: RED})]
    cyclic = [("p", {1: RED, 2: GREEN}), ("p", {21: RED, 2: GREEN})]
    assert conflicts(painted(*padded), None) == conflicts(painted(*cyclic), None) == {}
    assert conflicts(painted(*padded, ("trimmed", {0: BLACK, VOID: BLACK})), None) == {}


def test_void_may_have_any_color_but_that_of_a_class():
    border, white = ("p", {0: BLACK, 1: RED, VOID: BORDER}), ("q", {0: BLACK, 1: RED, VOID: WHITE})
    assert conflicts(painted(border, white), None) == {}
    first = ("q", {0: BLACK, 1: BORDER, 2: RED})
    assert list(conflicts(painted(border, border, first), None)) == ["c"]


def test_a_label_beyond_a_short_palette_was_cut_from_a_larger_one():
    words = "label 3 lies outside of its palette: a larger label (255?) was cut when it was saved"
    assert conflicts(painted(("p", {0: BLACK, 1: RED, 3: None})), None) == {"a": words}
    assert conflicts(painted(("p", {0: BLACK, 20: RED, VOID: None})), None) == {}  # eight bits hold 255


def test_a_palette_file_binds_labels_to_colors(tmp_path):
    (tmp_path / "palette.txt").write_text("0 0 0\n255 0 0\n0 255 0\n")
    reference = find_reference(VocFolder(tmp_path), ["background", "cat", "dog"])
    assert conflicts(painted(("p", {0: BLACK, 1: RED, 2: GREEN, VOID: WHITE})), reference) == {}
    masks = painted(("p", {0: BLACK, 1: GREEN}), ("q", {0: BLACK, 1: BLUE}), ("r", {VOID: RED}))
    assert conflicts(masks, reference) == {
        "a": "label 1 has color 0 255 0, which is label 2 in palette.txt",
        "b": "label 1 has color 0 0 255; in palette.txt it has color 255 0 0",
        "c": "label 255 has color 255 0 0, which is label 1 in palette.txt",
    }


def test_a_palette_file_comes_before_vocs_palette_and_before_cvats(tmp_path):
    (tmp_path / "labelmap.txt").write_text("".join(f"{name}:1,2,{label}::\n" for label, name in enumerate(CLASSES)))
    cvat = find_reference(VocFolder(tmp_path), CLASSES)
    (tmp_path / "palette.txt").write_text("".join(f"9 9 {label}\n" for label in range(22)))
    own = find_reference(VocFolder(tmp_path), CLASSES)
    assert cvat is not None and own is not None
    assert (cvat.origin, cvat.colors[20]) == ("labelmap.txt", (1, 2, 20))
    assert (own.origin, own.colors[20], own.colors[VOID]) == ("palette.txt", (9, 9, 20), (9, 9, 21))


def test_cvats_colors_are_found_by_name_whatever_the_order_and_the_decoration(tmp_path):
    (tmp_path / "labelmap.txt").write_text(
        "# label:color_rgb:parts:actions\r\n"
        "dog:51, 221,255::\r\n\r\nbody::\r\nbackground:0,0,0::\r\ncat:250,50,83:a:\r\n"
    )
    reference = find_reference(VocFolder(tmp_path), ["background", "cat", "dog", "cow"])
    assert reference is not None
    assert reference.colors == {0: BLACK, 1: (250, 50, 83), 2: (51, 221, 255)}
    foreign = painted(("p", {0: BLACK, 1: RED}))
    assert conflicts(foreign, reference) == {}  # a tool's own colors are no reason to refuse
    assert conflicts(painted(("p", {0: BLACK, 1: (51, 221, 255)})), reference) == {
        "a": "label 1 has color 51 221 255, which is label 2 in labelmap.txt"
    }


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("palette.txt", "0 0 0\n1 1 1\n", "2 colors for 3 classes; write r g b on each line"),
        ("palette.txt", "0 0 0\n1 1 1\n2 2 2\n3 3 3\n4 4 4\n", "5 colors for 3 classes"),
        ("palette.txt", "0 0 0\n1 1 1\n2 2 256\n", "the line '2 2 256' has no color"),
        ("palette.txt", "0 0 0\n1 1 1\n2 -2 2\n", "three numbers from 0 to 255"),
        ("palette.txt", "0 0 0\n1 1 1\n1 1 1\n", "color 1 1 1 is there for label 1 and label 2"),
        ("labelmap.txt", "background:0,0,0\ncat:1,1\n", "the line 'cat:1,1' has no color"),
        ("labelmap.txt", "background:0,0,0\ncat:0,0,0\n", "color 0 0 0 is there for label 0 and label 1"),
    ],
)
def test_a_malformed_file_is_refused_with_what_is_wrong(tmp_path, file, text, words):
    (tmp_path / file).write_text(text)
    with pytest.raises(PipelineError) as refused:
        find_reference(VocFolder(tmp_path), ["background", "cat", "dog"])
    assert str(refused.value).startswith(f"{tmp_path / file}: ")
    assert words in str(refused.value)
