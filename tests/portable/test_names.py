import pytest

from segmentation.names import markdown, one_line


def test_a_reason_of_several_lines_becomes_one():
    assert one_line(" worse on\nroads\r\n\t(see 12) ") == "worse on roads (see 12)"


@pytest.mark.parametrize("hidden", ["\x1b[2J", "\x07", "\u202e", "\u200b"])
def test_a_reason_with_what_is_not_seen_is_refused(hidden):
    with pytest.raises(ValueError, match=r"holds the \w+ character U\+"):
        one_line(f"good{hidden}")


def test_text_cannot_change_the_page_that_it_stands_in():
    assert markdown("a|b\n# <b>") == r"a\|b \# \<b\>"
    assert markdown("[x](http://y) `z` *w* a_b &lt;") == r"\[x\](http://y) \`z\` \*w\* a\_b \&lt;"
    assert markdown("gain: +0.01 (0.00 … 0.02)") == "gain: +0.01 (0.00 … 0.02)"
