import pytest

from hf_dilated.memory import MemoryPool


@pytest.fixture(params=["lightweight", "full"])
def pool(request: pytest.FixtureRequest) -> MemoryPool:
    return MemoryPool(request.param)
