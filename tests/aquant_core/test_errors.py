"""Named errors say what was wrong and what to do, also in another process."""

from __future__ import annotations

import pickle

import pytest

from aquant_core import errors
from aquant_core.errors import AQuantError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, AQuantError)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_to_another_process(kind: type[AQuantError]) -> None:
    error = pickle.loads(pickle.dumps(kind("The width is 9.", "Choose 2 to 8.")))
    assert type(error) is kind
    assert (error.detail, error.remedy, str(error)) == (
        "The width is 9.",
        "Choose 2 to 8.",
        "The width is 9. Choose 2 to 8.",
    )


def test_every_kind_has_a_code_of_its_own() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)
