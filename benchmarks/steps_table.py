"""What `benchmarks/test_host_steps.py` measured, made short: `python -m benchmarks.steps_table FROM.json`."""

import json
from pathlib import Path

import click

from benchmarks.pair import RESULTS, device_name


@click.command()
@click.argument("measured", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "host-steps.json")
def main(measured: Path, out: Path) -> None:
    """Keep the quartiles of each step, in microseconds, from a file of pytest-benchmark."""
    points = []
    for one in json.loads(measured.read_text())["benchmarks"]:
        params, stats = one["params"], one["stats"]
        points.append(
            {
                "arm": params["arm"],
                "requests": params["count"],
                "in": "C++" if params["carries"] else "Python",
                "passes": round(one["extra_info"]["passes_per_request_and_step"], 2),
                "fake_models": round(one["extra_info"]["models_us_per_step"], 1),
                **{name: round(1e6 * stats[name], 1) for name in ("min", "q1", "median", "q3")},
            }
        )
    out.write_text(json.dumps({"device": device_name("cpu"), "points": points}, indent=1) + "\n")
    click.echo(f"{len(points)} steps written to {out}")


if __name__ == "__main__":
    main()
