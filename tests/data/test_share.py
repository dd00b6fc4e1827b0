import argparse

import pytest

from calm_core.data.share import Share


def test_shares_cover_the_work_once():
    shares = [Share.parse(f"{index}/3").of(range(10)) for index in range(3)]
    assert sorted(part for share in shares for part in share) == list(range(10))
    assert Share().of(range(10)) == range(10)


@pytest.mark.parametrize("text", ["3/3", "1", "-1/2", "1/0", "a/b", "1/2/3"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no share"):
        Share.parse(text)
