"""The faces of relay: four ways to send and run jobs, each in its own words, behind the same few verbs."""

from __future__ import annotations

from tests.faces.aio import AsyncFace
from tests.faces.celery_face import CeleryFace
from tests.faces.direct import SyncFace
from tests.faces.dramatiq_face import DramatiqFace
from tests.faces.face import Face

FACES: dict[str, type[Face]] = {face.name: face for face in (SyncFace, AsyncFace, CeleryFace, DramatiqFace)}


def having(verb: str) -> list[str]:
    """The names of the faces that have a verb; a face says in `lacks` which it has not, and why."""
    assert any(verb in face.lacks for face in FACES.values()), f"no face lacks {verb!r}: test it on all"
    return [name for name, face in FACES.items() if verb not in face.lacks]
