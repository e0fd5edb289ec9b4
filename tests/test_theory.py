"""Measured competitive ratios have the shapes that theory gives them."""

import pytest

from kvist.theory import Fit, adversary, fit, growth, measure

SIZES = [10, 30, 100, 300]


def test_the_adversary_asks_for_one_token_more_than_fits() -> None:
    queries = adversary(5, 3)
    assert len(queries) == 18
    assert len({q.prompt for q in queries}) == 6
    assert [q.prompt for q in queries[:6]] == [q.prompt for q in queries[6:12]]


def test_l_lru_grows_linearly_and_rlt_logarithmically() -> None:
    rows = measure(SIZES, ["l-lru", "rlt"], rounds=8, seeds=12)
    assert [row.ratios["l-lru"] for row in rows] == [n + 1 for n in SIZES]
    line = fit(rows, "l-lru", "linear")
    assert (line.slope, line.r2) == (pytest.approx(1), pytest.approx(1))
    curve = fit(rows, "rlt", "log")
    assert curve.r2 > 0.97
    assert curve.r2 > fit(rows, "rlt", "linear").r2
    for row in rows:  # H_n within the spread of a dozen runs
        harmonic = sum(1 / k for k in range(1, row.n + 1))
        assert row.ratios["rlt"] == pytest.approx(harmonic, rel=0.25)


def test_the_optimum_misses_once_in_n_requests() -> None:
    (row,) = measure([50], ["belady"], rounds=6)
    assert row.ratios["belady"] == 1.0
    assert row.optimum == pytest.approx(5 * 51 / 50, abs=1)


def test_identical_for_identical_seeds() -> None:
    assert measure([20], ["rlt"], seed=3) == measure([20], ["rlt"], seed=3)
    assert measure([20], ["rlt"], seed=3) != measure([20], ["rlt"], seed=4)


def test_fit_of_known_lines() -> None:
    rows = measure([8, 16, 32], ["l-lru"])
    assert fit(rows, "l-lru", "linear").intercept == pytest.approx(1)
    words = growth({"linear": Fit(2.0, 1.0, 0.9), "log": Fit(1.0, 0.0, 0.5)})
    assert words == "grows like n: ratio = 2 n +1.00, R2 0.9000"


def test_a_cache_of_one_token_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens, not 1"):
        measure([1], ["rlt"])


@pytest.mark.parametrize("against", ["cycle", "trap", "hunter"])
def test_hedge_stays_within_the_bound(against: str) -> None:
    """4 H_n + 6 is what docs/theory.md proves; the hunter must cost a rule-bound policy about n."""
    rows = measure([10, 40, 160], ["hedge"], rounds=8, seeds=4, against=against)
    for row in rows:
        harmonic = sum(1 / k for k in range(1, row.n + 1))
        assert row.ratios["hedge"] <= 4 * harmonic + 6
    if against == "hunter":
        (row,) = measure([160], ["l-lfu"], rounds=8, against=against)
        assert row.ratios["l-lfu"] > 100


def test_unknown_adversary() -> None:
    with pytest.raises(ValueError, match="choose one of cycle, trap, hunter"):
        measure([10], ["rlt"], against="friend")
