"""The grid that chose the teacher's learning rates: `python -m experiments.tune_teacher --folder FOLDER`.

The middle teacher trains on weeks 1-14 and goes on with weeks 15-18, 19-22 and 23-26; what counts is the normalised
entropy of weeks 15-26, each part predicted whole by the teacher from before it, as the service would have it scored.
It sees no week that the demo or the ExFM experiment reports.

It chose 0.03 for the table (Adagrad), 0.003 for the layers (Adam), and 0.0003 for the layers when it goes on: of two
rates that give the same four digits the lower one. NE, going on at 0.0003:

| table, layers | 0.0003 | 0.001 | 0.003 | 0.01 |
|---|---|---|---|---|
| 0.01 | .6939 | .6900 | .6874 | .6884 |
| 0.03 | .6897 | .6855 | **.6853** | .6873 |
| 0.1 | .6912 | .6869 | .6871 | .6886 |

| goes on at | never | 0.0001 | 0.0003 | 0.001 | 0.003 |
|---|---|---|---|---|---|
| NE | .6947 | .6855 | **.6853** | .6853 | .6862 |
"""

import argparse
import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from experiments.data.complete_journey import EXAMPLE_COLUMNS, LABEL_COLUMN, build_impressions
from experiments.exfm_plan import FULL
from experiments.teacher import (
    AGAIN_RATE,
    LAYER_RATE,
    TABLE_RATE,
    TeacherTrainer,
    count_rows,
    iter_batches,
    iter_table,
    predict_logits,
)  # fmt: skip
from vm_training.metrics import normalized_entropy

_TABLE_RATES: Final = (0.01, 0.03, 0.1)
_LAYER_RATES: Final = (3e-4, 1e-3, 3e-3, 1e-2)
_AGAIN_RATES: Final = (None, 1e-4, 3e-4, 1e-3, 3e-3)


def score(trainer: TeacherTrainer, teacher: nn.Module, parts: Sequence[pa.Table], *, rate: float | None) -> float:
    """Give the NE of the parts when the teacher goes on at this rate of the layers; None: it does not go on."""
    trainer, logits = copy.deepcopy(trainer), []
    for part in parts:
        logits.append(predict_logits(teacher, part))
        if rate is not None:
            teacher = trainer.train(iter_table(part), num_rows=part.num_rows, layer_rate=rate).module
    return normalized_entropy(np.concatenate(logits), pa.concat_tables(parts)[LABEL_COLUMN].to_numpy())


def main() -> None:
    """Print the NE at each point: of the rates it begins with, going on at the kept rate; then of that rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the week files go")
    files = build_impressions(parser.parse_args().folder, weeks=[*FULL.first, *FULL.tune])
    first = [file.path for file in files if file.week in FULL.first]
    parts = [
        pa.concat_tables([_read(file.path) for file in files if file.week in FULL.part_after(boundary)])
        for boundary in FULL.boundaries()
        if boundary < FULL.tune[-1]
    ]
    for table_rate, layer_rate in itertools.product(_TABLE_RATES, _LAYER_RATES):
        trainer = TeacherTrainer(table_rate=table_rate)
        teacher = trainer.train(iter_batches(first), num_rows=count_rows(first), layer_rate=layer_rate)
        is_kept = (table_rate, layer_rate) == (TABLE_RATE, LAYER_RATE)
        for rate in _AGAIN_RATES if is_kept else (AGAIN_RATE,):
            entropy = score(trainer, teacher.module, parts, rate=rate)
            print(f"table {table_rate}, layers {layer_rate}, again {rate}: NE {entropy:.5f}", flush=True)


def _read(path: Path) -> pa.Table:
    return pq.read_table(path, columns=[*EXAMPLE_COLUMNS, LABEL_COLUMN])


if __name__ == "__main__":
    main()
