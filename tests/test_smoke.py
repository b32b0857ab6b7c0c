from mesh_storage import Message
from mesh_storage.testing import *
import pytest,time
@pytest.mark.parametrize("n",range(20))
def test_x(storage,n):
    with storage.begin() as uow:
        MessageFactory.create(uow=uow); RouteFactory.create(uow=uow); LogEntryFactory.create_batch(3,uow=uow)
        MeshFactory.create(uow=uow); NodeStateFactory.create(uow=uow);RoutingEntryFactory.create(uow=uow);ConfigEntryFactory.create(uow=uow);StateEntryFactory.create(uow=uow)
        assert uow.messages.count()==1
