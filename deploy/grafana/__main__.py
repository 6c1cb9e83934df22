"""`python -m deploy.grafana [FOLDER]` writes the dashboards as JSON, by default where Grafana is told to find them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.grafana.pipeline import pipeline
from deploy.grafana.shards import shards
from deploy.grafana.training import training

FOLDER = Path(__file__).parent / "dashboards"


def main(folder: Path) -> None:
    for made in (training, shards, pipeline):
        text = json.dumps(made(), indent=2, ensure_ascii=False)
        (folder / f"{made.__name__}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
