"""`das dataset`: declare datasets and look at them."""

from typing import Annotated

import typer

from das_service.cli.output import AsJson, PlainGroup, Url, read_json_file, say, say_json, say_table

dataset_app = typer.Typer(cls=PlainGroup, no_args_is_help=True, help="Declare datasets and look at them.")
Dataset = Annotated[str, typer.Argument(help="Name of the dataset.")]


@dataset_app.command("put")
def put_dataset(
    dataset: Dataset,
    file: Annotated[str, typer.Argument(help="JSON file of the declaration, `-` for stdin.")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Declare a dataset. Again is harmless; new nullable features are added; other changes are refused.

    Example: das dataset put ads ads.json

    with ads.json: {"entity_key": ["user_id"], "features": [{"name": "price", "type": "float"}, {"name": "user_id",
    "type": "category", "value_type": "string"}], "tasks": [{"name": "click", "label_window_seconds": 3600}]}
    """
    from das_service.client import Client

    with Client(url) as client:
        declared = client.put_dataset(dataset, read_json_file(file))
    if as_json:
        say_json(declared)
    else:
        say(f"dataset {dataset} is declared with {len(declared.get('features', []))} features")


@dataset_app.command("get")
def get_dataset(dataset: Dataset, url: Url = None) -> None:
    """Print a dataset's declaration as JSON, as `das dataset put` takes it.

    Example: das dataset get ads > ads.json
    """
    from das_service.client import Client

    with Client(url) as client:
        say_json(client.get_dataset(dataset))


@dataset_app.command("list")
def list_datasets(url: Url = None, as_json: AsJson = False) -> None:
    """List the declared datasets.

    Example: das dataset list
    """
    from das_service.client import Client

    with Client(url) as client:
        datasets = client.list_datasets()
    if as_json:
        say_json(datasets)
        return
    rows = [
        [d["dataset"], len(d.get("features", [])), ", ".join(t["name"] for t in d.get("tasks", [])), d["partitions"]]
        for d in datasets
    ]
    say_table(["dataset", "features", "tasks", "partitions"], rows, empty="no dataset is declared: das dataset put")
