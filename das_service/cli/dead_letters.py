"""`das dead-letters`: the examples that an FM failed on."""

from typing import Annotated

import typer

from das_service.cli.output import AsJson, PlainGroup, Url, say, say_json, say_table

dead_letters_app = typer.Typer(
    cls=PlainGroup, no_args_is_help=True, help="Examples that an FM failed on: look at them, try them again."
)
Dataset = Annotated[str, typer.Argument(help="Name of the dataset.")]
Fm = Annotated[str, typer.Argument(help="Name of the FM.")]


@dead_letters_app.command("list")
def list_dead_letters(
    dataset: Dataset,
    fm: Fm,
    limit: Annotated[int, typer.Option(help="Most rows shown.")] = 100,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the examples that an FM failed on, with the reasons.

    Example: das dead-letters list ads teacher
    """
    from das_service.client import Client

    with Client(url) as client:
        letters = client.dead_letters(dataset, fm, limit=limit)
    if as_json:
        say_json(letters)
        return
    columns = ["example_id", "event_time", "snapshot_id", "failed_at", "reason"]
    rows = [[letter.get(column) for column in columns] for letter in letters]
    say_table(columns, rows, empty=f"FM {fm} failed on no example of {dataset}")


@dead_letters_app.command("replay")
def replay_dead_letters(
    dataset: Dataset,
    fm: Fm,
    example_ids: Annotated[list[str] | None, typer.Argument(help="Which examples; default: all.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Let an FM try its dead letters again, with the snapshot that is active now.

    Example: das dead-letters replay ads teacher
    """
    from das_service.client import Client

    with Client(url) as client:
        answer = client.replay_dead_letters(dataset, fm, example_ids=example_ids or None)
    if as_json:
        say_json(answer)
    else:
        say(f"{answer.get('replayed', 0)} examples are tried again; das status shows how far it is")
