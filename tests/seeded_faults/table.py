"""All seeded faults."""

from __future__ import annotations

from tests.seeded_faults import in_artifact, in_builder, in_runtime, in_server

FAULTS = (*in_builder.FAULTS, *in_runtime.FAULTS, *in_artifact.FAULTS, *in_server.FAULTS)
