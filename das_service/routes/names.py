"""Parameters that many routes share."""

from typing import Annotated

from fastapi import Depends, Path

from das_service.service import Service, service_of
from schemas.names import NAME_PATTERN, SNAPSHOT_ID_PATTERN

DatasetName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the dataset.", examples=["ads"])]
FmName = Annotated[str, Path(pattern=NAME_PATTERN, description="Name of the FM.", examples=["teacher"])]
SnapshotName = Annotated[str, Path(pattern=SNAPSHOT_ID_PATTERN, description="Id of the snapshot.", examples=["s1"])]
ServiceOf = Annotated[Service, Depends(service_of)]
