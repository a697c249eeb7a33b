"""What several tables are asked: whether a guarded statement found its row, and which of many names there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqlalchemy import Delete, Update, select
from sqlalchemy.engine import CursorResult
from sqlalchemy.orm import InstrumentedAttribute, Session

_AT_ONCE = 500
"""Values that a statement is given: databases limit its parameters."""


def changed(session: Session, statement: Update | Delete) -> bool:
    """Carry out a statement meant for one row; whether that was there. What the session has read stays as it was."""
    result = session.execute(statement.execution_options(synchronize_session=False))
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def known(session: Session, column: InstrumentedAttribute[str], values: Sequence[str]) -> set[str]:
    """Those of the values that a column has."""
    return {value for some in in_pieces(values) for value in session.scalars(select(column).where(column.in_(some)))}


def in_pieces(values: Sequence[str]) -> Iterator[Sequence[str]]:
    """The values, no more at once than a statement may have."""
    return (values[start : start + _AT_ONCE] for start in range(0, len(values), _AT_ONCE))
