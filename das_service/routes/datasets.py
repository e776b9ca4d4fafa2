"""Declaring datasets."""

from typing import Any

from fastapi import APIRouter, Depends, Request, Response

from das_service.door.auth import Needs
from das_service.door.door import answer_type, read_declaration
from das_service.door.openapi import declaration_body, problems
from das_service.routes.names import DatasetName, ServiceOf
from schemas.dataset import DatasetSpec
from schemas.wire import JSON

router = APIRouter(tags=["datasets"])

_EXAMPLE = {
    "entity_key": ["user_id"],
    "features": [
        {"name": "price", "type": "float"},
        {"name": "user_id", "type": "category", "value_type": "string"},
        {"name": "item", "type": "category", "value_type": "int64", "nullable": True},
    ],
    "tasks": [{"name": "click", "label_window_seconds": 3600}],
    "partitions": 4,
}


@router.put(
    "/v1/datasets/{dataset}",
    dependencies=[Depends(Needs("admin"))],
    responses={201: {"model": DatasetSpec, "description": "Created."}, **problems(400, 409, 413, 415, 422)},
    openapi_extra=declaration_body(DatasetSpec, _EXAMPLE),
    summary="Declare a dataset",
)
async def put_dataset(dataset: DatasetName, request: Request, response: Response, service: ServiceOf) -> DatasetSpec:
    """Declare a dataset, or let it grow by nullable features.

    200 when it was declared already, 201 when it is new. Features can't be removed or changed, nor can the partitions:
    409 `dataset_conflict` has the `differences`.
    """
    answer_type(request, JSON)
    wanted = await read_declaration(request, DatasetSpec, timeout_seconds=service.settings.body_timeout_seconds)
    spec, is_new = await service.in_thread(service.declarations.put_dataset, dataset, wanted)
    response.status_code = 201 if is_new else 200
    return spec


@router.get(
    "/v1/datasets/{dataset}",
    dependencies=[Depends(Needs("read"))],
    responses=problems(404),
    summary="Read a declaration",
)
async def get_dataset(dataset: DatasetName, service: ServiceOf) -> DatasetSpec:
    """Give the declaration that holds now."""
    return (await service.in_thread(service.current_catalog)).spec(dataset)


@router.get("/v1/datasets", dependencies=[Depends(Needs("read"))], responses=problems(), summary="List datasets")
async def list_datasets(service: ServiceOf) -> dict[str, list[dict[str, Any]]]:
    """Give all declarations, each with the dataset's name."""
    catalog = await service.in_thread(service.current_catalog)
    specs = sorted(catalog.datasets.items())
    return {"datasets": [{"dataset": name, **spec.model_dump(mode="json")} for name, spec in specs]}
