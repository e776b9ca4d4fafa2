"""`das fm` and `das snapshot`: who scores, and with which weights."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from das_service.cli.folder import folder_settings
from das_service.cli.output import (
    AsJson,
    InputError,
    PlainGroup,
    Url,
    say,
    say_json,
    say_table,
    warn,
)

fm_app = typer.Typer(cls=PlainGroup, no_args_is_help=True, help="Declare FMs and look at them.")
snapshot_app = typer.Typer(
    cls=PlainGroup,
    no_args_is_help=True,
    help="Publish an FM's snapshots, switch between them, try them in the shadow, roll back, retire.",
)
Dataset = Annotated[str, typer.Argument(help="Name of the dataset.")]
Fm = Annotated[str, typer.Argument(help="Name of the FM.")]
IfMatch = Annotated[str | None, typer.Option("--if-match", help="ETag that must still hold; default: what it is now.")]
SnapshotId = Annotated[str, typer.Argument(help="Id of the snapshot.")]


@fm_app.command("put")
def put_fm(
    dataset: Dataset,
    fm: Fm,
    required: Annotated[
        bool, typer.Option("--required/--optional", help="Whether its unscored examples stay in the log.")
    ] = True,
    url: Url = None,
) -> None:
    """Declare an FM. It scores the examples that come from then on, once a snapshot is active.

    Example: das fm put ads teacher
    """
    from das_service.client import Client

    with Client(url) as client:
        client.put_fm(dataset, fm, required=required)
    say(f"FM {fm} of dataset {dataset} is declared, {'required' if required else 'optional'}")


@fm_app.command("list")
def list_fms(dataset: Dataset, url: Url = None, as_json: AsJson = False) -> None:
    """List the FMs of a dataset.

    Example: das fm list ads
    """
    from das_service.client import Client

    with Client(url) as client:
        fms = client.list_fms(dataset)
    if as_json:
        say_json(fms)
        return
    rows = [[fm["fm"], "yes" if fm.get("required") else "no", fm.get("active")] for fm in fms]
    say_table(["fm", "required", "active snapshot"], rows, empty=f"dataset {dataset} has no FM: das fm put")


@fm_app.command("show")
def show_fm(dataset: Dataset, fm: Fm, url: Url = None) -> None:
    """Print an FM as JSON: outputs, widths, codecs, active snapshot.

    Example: das fm show ads teacher
    """
    from das_service.client import Client

    with Client(url) as client:
        say_json(client.get_fm(dataset, fm))


@snapshot_app.command("publish")
def publish(
    folder: Annotated[Path, typer.Argument(help="Snapshot folder, as fm_inference.export_snapshot writes it.")],
    dataset: Annotated[str, typer.Option("--dataset", help="Dataset whose FM it is of.")],
    activate: Annotated[bool, typer.Option("--activate", help="Let it score as soon as it is validated.")] = False,
    timeout_seconds: Annotated[float, typer.Option("--timeout-seconds", help="Longest wait for a worker.")] = 300.0,
    service_folder: Annotated[
        Path | None, typer.Option("--folder", help="Folder of `das up`, instead of DAS_SNAPSHOTS_URI.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Copy a snapshot to DAS_SNAPSHOTS_URI, register it and wait until a worker has checked it.

    Example: das snapshot publish ./teacher-2024-05-01 --dataset ads --activate
    """
    from das_service.client import Client
    from das_service.settings import load_settings
    from das_service.snapshot_publish import publish_snapshot

    with Client(url) as client:
        record = publish_snapshot(
            client,
            load_settings(None, **folder_settings(service_folder)),
            dataset,
            folder,
            activate=activate,
            timeout_seconds=timeout_seconds,
            on_step=warn,
        )
    _say_snapshot(record, as_json=as_json)


@snapshot_app.command("register")
def register(
    dataset: Dataset,
    fm: Fm,
    snapshot_id: SnapshotId,
    uri: Annotated[str, typer.Option("--uri", help="Where it lies, under DAS_SNAPSHOTS_URI.")],
    sha256: Annotated[str, typer.Option("--sha256", help="Hex SHA-256 of its snapshot.json.")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Register a snapshot that lies under DAS_SNAPSHOTS_URI already.

    Example: das snapshot register ads teacher s7 --uri s3://models/ads/teacher/s7 --sha256 0f3a...
    """
    from das_service.client import Client

    with Client(url) as client:
        _say_snapshot(
            client.register_snapshot(dataset, fm, snapshot_id=snapshot_id, uri=uri, sha256=sha256), as_json=as_json
        )


@snapshot_app.command("list")
def list_snapshots(dataset: Dataset, fm: Fm, url: Url = None, as_json: AsJson = False) -> None:
    """List an FM's snapshots and their states.

    Example: das snapshot list ads teacher
    """
    from das_service.client import Client

    with Client(url) as client:
        snapshots = client.list_snapshots(dataset, fm)
    if as_json:
        say_json(snapshots)
        return
    rows = [
        [s["snapshot_id"], s["state"], s.get("trained_through"), "; ".join(s.get("reasons") or [])] for s in snapshots
    ]
    say_table(
        ["snapshot", "state", "trained_through", "reasons"],
        rows,
        empty=f"FM {fm} has no snapshot: das snapshot publish",
    )


@snapshot_app.command("show")
def show(dataset: Dataset, fm: Fm, snapshot_id: SnapshotId, url: Url = None, as_json: AsJson = False) -> None:  # noqa: ARG001 - it is JSON anyway
    """Print a snapshot as JSON: state, reasons, trained_through, how it did on recent labelled examples.

    Example: das snapshot show ads teacher s7
    """
    from das_service.client import Client

    with Client(url) as client:
        say_json(client.get_snapshot(dataset, fm, snapshot_id))


@snapshot_app.command("activate")
def activate(
    dataset: Dataset,
    fm: Fm,
    snapshot_id: SnapshotId,
    if_match: IfMatch = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Let a validated snapshot score from now on, with no pause.

    Example: das snapshot activate ads teacher s7
    """
    from das_service.client import Client

    with Client(url) as client:
        answer = client.activate_snapshot(dataset, fm, snapshot_id, if_match=if_match)
    _say_done(answer, f"snapshot {snapshot_id} of FM {fm} is active", as_json=as_json)


@snapshot_app.command("rollback")
def rollback(
    dataset: Dataset,
    fm: Fm,
    to: Annotated[str | None, typer.Option("--to", help="Snapshot to go back to; default: the one before.")] = None,
    if_match: IfMatch = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Go back to the snapshot that was active before; the present one can publish nothing any more.

    Example: das snapshot rollback ads teacher
    """
    from das_service.client import Client

    with Client(url) as client:
        present, etag = client.active(dataset, fm)
        etag = if_match or etag
        if to is None:
            answer = client.roll_back_snapshot(dataset, fm, if_match=etag)
        else:
            answer = client.activate_snapshot(dataset, fm, to, if_match=etag)
    said = f"snapshot {answer.get('snapshot_id')} of FM {fm} is active again (before: {present})"
    _say_done(answer, said, as_json=as_json)


@snapshot_app.command("shadow")
def shadow(
    dataset: Dataset,
    fm: Fm,
    snapshot_id: Annotated[str | None, typer.Argument(help="Id of the snapshot; none: say which one it is.")] = None,
    share: Annotated[float, typer.Option("--share", help="Share of the examples that it scores, above 0 to 1.")] = 0.1,
    end: Annotated[bool, typer.Option("--end", help="Let none shadow the active snapshot any more.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Let a validated snapshot score a share of the examples beside the active one. Its answers are kept, not served.

    Example: das snapshot shadow ads teacher s8 --share 0.05
    """
    from das_service.client import Client

    if end and snapshot_id is not None:
        raise InputError("--end takes no snapshot: there is one shadow at most")
    with Client(url) as client:
        if end:
            answer = client.end_shadow(dataset, fm)
        elif snapshot_id is None:
            answer = client.shadow(dataset, fm)
        else:
            answer = client.shadow_snapshot(dataset, fm, snapshot_id, share=share)
    named = answer.get("snapshot_id")
    said = f"FM {fm} has no shadow" if named is None else f"snapshot {named} of FM {fm} scores {answer['share']:.2%}"
    _say_done(answer, said, as_json=as_json)


@snapshot_app.command("retire")
def retire(dataset: Dataset, fm: Fm, snapshot_id: SnapshotId, url: Url = None, as_json: AsJson = False) -> None:
    """Let a snapshot never score again. What it said stays readable; workers unload it.

    Example: das snapshot retire ads teacher s6
    """
    from das_service.client import Client

    with Client(url) as client:
        _say_snapshot(client.retire_snapshot(dataset, fm, snapshot_id), as_json=as_json)


@snapshot_app.command("audit")
def audit(dataset: Dataset, fm: Fm, url: Url = None, as_json: AsJson = False) -> None:
    """List who changed what of an FM and its snapshots, the oldest first; the last 256 changes are kept.

    Example: das snapshot audit ads teacher
    """
    from das_service.client import Client

    with Client(url) as client:
        entries = client.audit(dataset, fm)
    if as_json:
        say_json(entries)
        return
    rows = [
        [e["at"], e["who"], e["what"], e["snapshot_id"], f"{_plain(e['before'])} -> {_plain(e['after'])}"]
        for e in entries
    ]
    say_table(["at", "who", "what", "snapshot", "before -> after"], rows, empty=f"nothing is noted of FM {fm} yet")


def _plain(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in fields.items()) or "nothing"


def _say_done(answer: dict[str, Any], said: str, *, as_json: bool) -> None:
    if as_json:
        say_json(answer)
    else:
        say(said)


def _say_snapshot(record: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        say_json(record)
    else:
        say(f"snapshot {record['snapshot_id']} is {record['state']}")
