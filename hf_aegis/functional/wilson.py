"""How far a success rate can be trusted: Wilson's score interval (Wilson, 1927, JASA 22:209-212)."""

from statistics import NormalDist


def wilson_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    r"""
    Score interval of a probability of which `successes` out of `trials` independent trials speak.

    With the normal quantile `z` and the observed rate `p`, the bounds are
    `(p + z²/2n ± z·sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n)`: the probabilities that a normal test would not reject.
    Unlike `p ± z·sqrt(p(1 - p)/n)` they stay within [0, 1] and are not of zero width after no or only successes.

    Args:
        successes (`int`): From 0 to `trials`.
        trials (`int`): At least 1.
        level (`float`, *optional*, defaults to `0.95`): Confidence.

    Returns:
        `tuple[float, float]`: lower and upper bound.

    Raises:
        ValueError: If a number is out of range.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"expected at least 1 trial and from 0 to all successes; found {successes} of {trials}.")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1; found {level}.")
    z = NormalDist().inv_cdf((1 + level) / 2)
    rate = successes / trials
    centre = rate + z**2 / (2 * trials)
    margin = z * (rate * (1 - rate) / trials + z**2 / (4 * trials**2)) ** 0.5
    scale = 1 + z**2 / trials
    # The bound on the side of a certain outcome is exact, and rounding would put it beside.
    low = 0.0 if successes == 0 else (centre - margin) / scale
    high = 1.0 if successes == trials else (centre + margin) / scale
    return low, high
