"""The grid that chose the students' learning rates: `python -m experiments.tune_students --folder FOLDER`.

Each point trains both students without supervision on the labels of weeks 1-26, once; what counts is the normalised
entropy of weeks 14-26, each batch predicted before it was trained on. It sees neither a teacher nor a week that the
demo reports.

It chose 0.1 for the table (Adagrad) and 0.01 for the layers (Adam). NE of the students of display / mailer:

| table, layers | 0.003 | 0.01 | 0.03 |
|---|---|---|---|
| 0.03 | .7763 / .7491 | .7721 / .7454 | .7711 / .7449 |
| 0.1 | .7697 / .7438 | **.7691 / .7433** | .7700 / .7455 |
| 0.3 | .7911 / .7637 | .7915 / .7654 | .7992 / .7715 |
"""

import argparse
import itertools
from pathlib import Path
from typing import Final

import numpy as np

from experiments.data.complete_journey import TEACHER_WEEKS, build_impressions
from experiments.students import STUDENTS, Rates, Rows, Trainer, build_rows, read_table
from experiments.teacher import torch_settings
from vm_training.metrics import normalized_entropy

_TABLE_RATES: Final = (0.03, 0.1, 0.3)
_LAYER_RATES: Final = (3e-3, 1e-2, 3e-2)
_FIRST_COUNTED_WEEK: Final = 14


def score(rows: Rows, weeks: np.ndarray, *, rates: Rates) -> float:
    """Give the progressive NE of the counted weeks at these rates."""
    with torch_settings(seed=0, num_threads=1):
        logits = Trainer(rates).train(rows)
    is_counted = weeks >= _FIRST_COUNTED_WEEK
    return normalized_entropy(logits[is_counted], rows.labels.numpy()[is_counted])


def main() -> None:
    """Print the NE of each student at each point, the best mean last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the week files go")
    paths = [file.path for file in build_impressions(parser.parse_args().folder, weeks=TEACHER_WEEKS)]
    tables = {name: read_table(paths, student=name) for name in STUDENTS}
    rows = {name: build_rows(table) for name, table in tables.items()}
    found = []
    for table_rate, layer_rate in itertools.product(_TABLE_RATES, _LAYER_RATES):
        rates = Rates(table=table_rate, layers=layer_rate)
        entropies = [score(rows[name], tables[name]["week"].to_numpy(), rates=rates) for name in STUDENTS]
        found.append((float(np.mean(entropies)), rates))
        print(rates, dict(zip(STUDENTS, np.round(entropies, 4).tolist(), strict=True)), flush=True)
    print("best:", min(found, key=lambda one: one[0]))


if __name__ == "__main__":
    main()
