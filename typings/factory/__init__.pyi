# The part of factory_boy that mesh_storage.testing uses; the package itself has no complete types.
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")

class Factory(Generic[_T]):
    @classmethod
    def build(cls, **kwargs: Any) -> _T: ...
    @classmethod
    def create(cls, *, uow: Any, **kwargs: Any) -> Any: ...
    @classmethod
    def build_batch(cls, size: int, **kwargs: Any) -> list[_T]: ...

# Declarations stand for the value that they make, so that an attribute has the type of its values.
def Sequence(function: Callable[[int], _T]) -> _T: ...  # noqa: N802 - factory_boy's name
def LazyFunction(function: Callable[[], _T]) -> _T: ...  # noqa: N802 - factory_boy's name
def LazyAttribute(function: Callable[[Any], _T]) -> _T: ...  # noqa: N802 - factory_boy's name
