"""Draw results.json (or, with --fleet, the simulation on stdin) as SVG files."""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

OUT = Path(__file__).resolve().parent / "charts"
OURS, THEIRS, PLAIN = "#d97757", "#8a8f98", "#c9ccd1"
PLAIN_ONES = ("pass", "json", "attribute", "bare", "the same")
CURVES = {
    "access_token": OURS,
    "load": THEIRS,
    "save": "#3d6b8f",
    "refresh for all": "#5b8c5a",
}

DRAWN = {
    "import": ("import", "pass", "Importing, against python -c pass"),
    "token from a file": ("token", "pass", "Printing a living token, against -c pass"),
    "memory of token": ("memory", "pass", "Peak memory of that, against -c pass"),
    "living token": ("call", None, "Handing out a living token"),
    "living token, 8 threads": ("threads", None, "The same from 8 threads, each call"),
    "prepared request": ("signed", None, "Signing a prepared request"),
    "callback to return": ("login", None, "From the callback to the end of the login"),
}


def settle():
    """The same file from the same figures, readable on light and on dark pages."""
    plt.rcParams.update(
        {
            "svg.hashsalt": "claude_oauth",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def save(figure, name):
    OUT.mkdir(exist_ok=True)
    path = OUT / f"{name}.svg"
    figure.savefig(
        path, bbox_inches="tight", facecolor="white", metadata={"Date": None}
    )
    plt.close(figure)
    print(f"drew {path.name}", file=sys.stderr)


def colour(label):
    if "claude" in label:
        return OURS
    return PLAIN if label.startswith(PLAIN_ONES) else THEIRS


def with_unit(seconds):
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def bars(figures, name, reference, title):
    """One bar each, the smallest on top, on a logarithmic scale."""
    if reference:
        values = {
            label: statistics.median(a / b for a, b in zip(rows, figures[reference]))
            for label, rows in figures.items()
        }
    else:
        values = {label: statistics.median(rows) for label, rows in figures.items()}
    labels = sorted(values, key=values.get, reverse=True)
    figure, axes = plt.subplots(figsize=(7, 0.34 * len(labels) + 0.9))
    shown = [values[label] for label in labels]
    drawn = axes.barh(labels, shown, color=[colour(label) for label in labels])
    texts = [f"{v:.1f} ×" if reference else with_unit(v) for v in shown]
    axes.bar_label(drawn, texts, padding=3)
    axes.set_xscale("log")
    axes.set_xlim(min(shown) * 0.7, max(shown) * 2.2)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(f"{title} (logarithmic)", loc="left", fontsize=11)
    save(figure, name)


def growth(results):
    """Cost by number of processes, and by size of the record."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for axes, ending, label in (
        (left, ", by processes", "processes"),
        (right, ", by KiB of record", "KiB of record"),
    ):
        for row, figures in results.items():
            if row.startswith("growth") and row.endswith(ending):
                sizes = [float(size) for size in figures]
                values = [statistics.median(rows) for rows in figures.values()]
                name = row[len("growth: ") : -len(ending)]
                axes.plot(sizes, values, marker="o", label=name, color=CURVES[name])
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.set_ylim(bottom=1e-7)
    left.set_ylabel("seconds")
    left.set_xscale("log", base=2)
    left.set_xticks([1, 8, 64, 256], ["1", "8", "64", "256"])
    left.legend(frameon=False)
    save(figure, "growth")


def fleet(result):
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    day = result["fleet"]
    names = ["at each refresh", "what is missing"]
    counts = [day["without"] / 1e6, day["with"] / 1e6]
    left.bar_label(left.bar(names, counts, color=[THEIRS, OURS]), fmt="%.2f")
    left.set_ylabel("million profile requests a day")
    left.set_title(f"{day['users'] / 1e6:g} million users", loc="left", fontsize=11)
    users = [0, 2 * result["users_of_claim"] / 1e6]
    right.plot(users, [0, 2 * result["claim"] / 1e6], color=OURS)
    right.axhline(result["claim"] / 1e6, color=THEIRS, linestyle="--")
    right.annotate("published: 7 million", (0, result["claim"] / 1e6 + 0.3))
    right.set_xlabel("million users")
    right.set_ylabel("million requests saved a day")
    figure.tight_layout()
    save(figure, "fleet")


def main(argument):
    settle()
    if argument == "--fleet":
        fleet(json.load(sys.stdin))
        return
    results = json.loads(Path(argument).read_text())
    for row, (name, reference, title) in DRAWN.items():
        bars(results[row], name, reference, title)
    growth(results)


if __name__ == "__main__":
    main(sys.argv[1])
