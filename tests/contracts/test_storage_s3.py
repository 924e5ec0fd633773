from __future__ import annotations

from secrets import token_hex
from typing import TYPE_CHECKING

import pytest

from cachesrv.storage.decorators import Direct, Limited, Retrying
from cachesrv.storage.s3 import S3Store
from tests.contracts.storage_contract import StorageContract

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from botocore.session import Session

    from tests.radosgw import Gateway


@pytest.fixture(scope="session")
def session(gateway: Gateway) -> Session:
    return gateway.session()


class TestS3Store(StorageContract):
    """Ceph honours If-None-Match on PUT; what has no such help is in TestS3StoreWithoutConditions."""

    @pytest.fixture
    async def store(self, gateway: Gateway, bucket: str, session: Session) -> AsyncIterator[S3Store]:
        requests = Retrying(Limited(Direct()))
        store = S3Store(bucket, requests=requests, endpoint=gateway.endpoint, prefix=token_hex(8), session=session)
        yield store
        await store.close()
