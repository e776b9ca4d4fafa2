"""`python -m fm_inference`: the worker role; `das worker` runs it."""

import logging
import sys

from das_service.settings import SettingsError, load_settings
from fm_inference.threads import bound_threads


def main() -> int:
    """Run a worker with the settings of the environment; give the exit code."""
    try:
        settings = load_settings()
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 - there is no log yet
        return 2
    bound_threads(settings)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    import pyarrow as pa  # noqa: PLC0415 - after the thread limits are in the environment
    import torch  # noqa: PLC0415

    torch.set_num_threads(settings.torch_threads)
    pa.set_cpu_count(settings.torch_threads)
    from das_service.role import exit_now  # noqa: PLC0415
    from fm_inference.worker import main as run_worker  # noqa: PLC0415

    exit_now(run_worker(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
