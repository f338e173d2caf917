"""Scores of drift by scipy and Evidently, beside those of `highwater drift`: reads rows and answers from stdin, prints what differs."""

import json
import math
import sys

import numpy as np
import pandas as pd
from evidently.legacy.calculations.stattests.hellinger_distance import _hellinger_distance
from evidently.legacy.calculations.stattests.jensenshannon import _jensenshannon
from evidently.legacy.calculations.stattests.psi import _psi
from evidently.legacy.core import ColumnType
from scipy import stats
from scipy.spatial import distance

EPSILON = 1e-10


def rows_of(counts):
    """The ids of bins, each as often as it was counted."""
    return pd.Series(np.repeat([int(bin) for bin in counts], list(counts.values())))


def added(parts):
    found = {}
    for part in parts:
        for bin, count in part.items():
            found[bin] = found.get(bin, 0) + count
    return found


def score(measure, smoothing, reference, current):
    """Of counts; a reference of shares is a profile."""
    is_profile = all(isinstance(weight, float) for weight in reference.values())
    bins = sorted(reference if is_profile else {bin for bin in {**reference, **current} if reference.get(bin, 0) + current.get(bin, 0) > 0})
    counts = np.array([[side.get(bin, 0) for bin in bins] for side in (reference, current)], dtype=float)
    m = sum(current.values())
    p = counts[0] if is_profile else counts[0] / counts[0].sum()
    q = counts[1] / m
    if smoothing == "count":
        p, q = ((row + 1) / (row + 1).sum() for row in counts)
    if smoothing == "scouter":
        p, q = p + EPSILON, q + EPSILON
    if measure == "psi" and smoothing == "evidently":
        return _psi(rows_of(reference), rows_of(current), ColumnType.Categorical, 0.1)[0]
    if measure == "psi":
        return float(np.sum((p - q) * np.log(p / q)))
    if measure == "js":
        found = distance.jensenshannon(p, q, base=2)
        if smoothing == "none":
            same = _jensenshannon(rows_of(reference), rows_of(current), ColumnType.Categorical, 0.1, base=2)[0]
            assert math.isclose(found, same, rel_tol=1e-9), (found, same)
        return float(found)
    if measure == "hellinger":
        found = float(np.linalg.norm(np.sqrt(p) - np.sqrt(q)) / math.sqrt(2))
        if smoothing == "none":
            same = _hellinger_distance(rows_of(reference), rows_of(current), ColumnType.Categorical, 0.1)[0]
            assert math.isclose(found, same, rel_tol=1e-6), (found, same)
        return found
    if measure == "tvd":
        return float(np.abs(p - q).sum() / 2)
    if measure == "chi2" and is_profile:
        return float(np.sum((m * q - m * p) ** 2 / (m * p)))
    if measure == "chi2":
        return float(stats.chi2_contingency(counts, correction=False)[0])
    raise ValueError(measure)


def of_values(measure, reference, current):
    if measure == "ks":
        return float(stats.ks_2samp(reference, current).statistic)
    n, m = len(reference) - 1, len(current) - 1
    pooled = math.sqrt((n * np.var(reference, ddof=1) + m * np.var(current, ddof=1)) / (n + m))
    return float((np.mean(current) - np.mean(reference)) / pooled)


def threshold(measure, rule, reference, current, chunks, of):
    size = lambda sample: len(sample) if isinstance(sample, list) else sum(sample.values())
    is_profile = isinstance(reference, dict) and all(isinstance(weight, float) for weight in reference.values())
    parts = 1 / size(current) + (0 if is_profile else 1 / size(reference))
    if rule.startswith("sd:"):
        scores = [abs(of(reference, chunk)) for chunk in chunks]
        return float(np.mean(scores) + float(rule[3:]) * np.std(scores))
    if not rule.startswith("chi2:"):
        return float(rule)
    alpha = float(rule[5:])
    if measure == "smd":
        return float(stats.norm.ppf(1 - alpha / 2) * math.sqrt(parts))
    if measure == "ks":
        return math.sqrt(-math.log(alpha / 2) / 2) * math.sqrt(parts)
    bins = reference if is_profile else {bin for bin in {**reference, **current} if reference.get(bin, 0) + current.get(bin, 0) > 0}
    # Of one bin there are no two opinions; scipy has NaN.
    limit = float(stats.chi2.ppf(1 - alpha, len(bins) - 1)) if len(bins) > 1 else 0.0
    return {
        "psi": limit * parts,
        "js": math.sqrt(limit * parts / (8 * math.log(2))),
        "hellinger": math.sqrt(limit * parts / 8),
        "chi2": limit,
    }[measure]


def main():
    given, compared, wrong = json.load(sys.stdin), 0, []
    for asked in given["answers"]:
        rows, answer = given[asked["table"]], asked["answer"]
        measure, smoothing, against = answer["measure"], answer["smoothing"], asked["against"]
        is_counts = asked["table"] == "psi"
        merged = added if is_counts else lambda parts: [value for part in parts for value in part]
        of = lambda reference, current: (
            score(measure, smoothing, reference, current) if is_counts else of_values(measure, reference, current)
        )
        series = answer["features" if is_counts else "metrics"]
        assert set(series) == set(rows["1.0.0"]), (set(series), set(rows["1.0.0"]))
        for name, found in series.items():
            days = rows["1.0.0"][name]
            chunks = []
            if against == "window":
                chunks = [days[day] for day in sorted(days)[:5]]
            elif against == "version":
                chunks = [rows["2.0.0"][name][day] for day in sorted(rows["2.0.0"][name])[5:]]
            assert [day[:10] for day in found["created_at"]] == sorted(days)[5:], found["created_at"]
            for place, day in enumerate(sorted(days)[5:]):
                if against == "previous":
                    reference = days[sorted(days)[4 + place]]
                elif against == "ago":
                    reference = days[sorted(days)[place]]
                elif against == "profile":
                    reference = given["profile"][name]
                else:
                    reference = merged(chunks)
                size = lambda sample: len(sample) if isinstance(sample, list) else sum(sample.values())
                reference_count = found["reference_count"]
                reference_count = reference_count[place] if isinstance(reference_count, list) else reference_count
                wanted_threshold = threshold(measure, answer["threshold_rule"], reference, days[day], chunks, of)
                pairs = [
                    ("score", found["score"][place], of(reference, days[day])),
                    ("count", found["count"][place], size(days[day])),
                    ("threshold", found["threshold"][place], wanted_threshold),
                    ("over", found["over"][place], abs(of(reference, days[day])) > wanted_threshold),
                ]
                if against != "profile":
                    pairs.append(("reference_count", reference_count, size(reference)))
                for what, ours, theirs in pairs:
                    compared += 1
                    # What is infinite has no form in JSON.
                    is_same = math.isinf(theirs) if ours is None else math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12)
                    if not is_same:
                        wrong.append(f"{asked['arguments']} {name} {day}: {what} is {ours}, but {theirs} by others")
    print("\n".join(wrong[:20]))
    print(compared, "compared", file=sys.stderr)
    sys.exit(1 if wrong or compared == 0 else 0)


main()
