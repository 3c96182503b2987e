"""The figure of `lab serve-cost`: what each turn of a conversation costs, by structure."""

import matplotlib.ticker
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import BASELINE, COLOURS, MARKERS, style

PANELS = (
    ("prefill_flops", "FLOPs to read the inputs", 1e9, "GFLOPs a turn (exact)"),
    ("cache_bytes", "keys and values kept", 2**20, "MiB"),
    ("first_token_seconds", "time to the first token", 1e-3, "milliseconds"),
    ("token_seconds", "time of each further token", 1e-3, "milliseconds"),
)


def conversation(frame: pd.DataFrame, title: str, *, baseline: str = "decoder_only") -> Figure:
    """Rows of lab.conversation.Measured, one a structure and turn; a panel for each cost. Times are medians."""
    names = list(dict.fromkeys(frame["structure"]))
    others = [name for name in names if name != baseline]
    with style():
        figure = Figure(figsize=(9.6, 6.6), layout="constrained")
        axes = figure.subplots(2, 2)
        for axis, (column, heading, unit, label) in zip(axes.flat, PANELS, strict=True):
            for place, name in enumerate(sorted(names, key=baseline.__eq__)):  # the baseline on top
                rows = frame[frame["structure"] == name]
                index = 0 if name == baseline else others.index(name)
                colour, marker = (
                    BASELINE if name == baseline else (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
                )
                line = "-" if index < len(COLOURS) else "--"
                shift = 0.2 * (place / max(1, len(names) - 1) - 0.5)  # equal numbers stay visible
                axis.plot(
                    rows["turn"] + shift,
                    rows[column] / unit,
                    color=colour,
                    marker=marker,
                    ls=line,
                    ms=5,
                    alpha=0.9,
                    label=name,
                )
            axis.set(title=heading, xlabel="turn of the conversation", ylabel=label)
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(names)))
        figure.suptitle(title, fontsize=10)
    return figure
