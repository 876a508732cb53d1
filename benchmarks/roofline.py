"""Draws a token and a prompt of a decoder on this machine's roofline: docs/figures/token.svg and prompt.svg.

    python benchmarks/roofline.py smollm2.llmc --seconds 30

Prints the table that the numbers in the figures refer to: what each kernel computes, its share of the kernels' time,
and how near it comes to its roofline. The ceilings are measured in the same run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmc.bench import decoder_tasks
from llmc.report.figures import roofline
from llmc.report.profiles import take_profiles

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
PROMPT, TOKENS = 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="a decoder")
    parser.add_argument("--seconds", type=float, default=10, help="to profile each task")
    parser.add_argument("--folder", type=Path, default=FIGURES, help="for the figures")
    args = parser.parse_args()
    profiles = take_profiles(args.artifact, None, decoder_tasks([PROMPT], TOKENS), args.seconds)
    for file, task in (("token", f"decode {TOKENS}"), ("prompt", f"prefill {PROMPT}")):
        profile = profiles.tasks[task]
        figure = roofline(profile, profiles.ceilings)
        (args.folder / f"{file}.svg").write_text(figure.replace("<svg", '<svg style="background:white"', 1), "utf8")
        print(f"\n{file}: {profile.after.seconds * 1e3:.2f} ms\n")
        print("| | kernel | share | of roofline |\n|---|---|---|---|")
        for i, (operator, _) in enumerate(profile.operators, 1):
            if operator.ops:
                sizes = ", ".join(f"{k} {operator.workload[k]}" for k in "NK" if k in operator.workload)
                share = operator.seconds / profile.after.kernels
                print(f"| {i} | {operator.name} {sizes} | {share:.0%} | {operator.roofline:.0%} |")


if __name__ == "__main__":
    main()
