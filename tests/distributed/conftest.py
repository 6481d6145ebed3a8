"""Two and three processes that wait for runs, for all modules of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.crew import Crew


@pytest.fixture(scope="package")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(2, tmp_path_factory.mktemp("crew") / "two.log")
    yield crew
    crew.close()


@pytest.fixture(scope="package")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(3, tmp_path_factory.mktemp("crew") / "three.log")
    yield crew
    crew.close()


@pytest.fixture(scope="package")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(4, tmp_path_factory.mktemp("crew") / "four.log")
    yield crew
    crew.close()
