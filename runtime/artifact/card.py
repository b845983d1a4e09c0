"""The card that is planned for: FuriosaAI's RNGD, by its published specification.

Source: the RNGD page of the vendor's documentation (48 GB of HBM3 at 1.5 TB/s, 8 PEs a card); the share of one PE is
an eighth. Bandwidth between PEs is not published, so that no time is derived from it.
"""

from __future__ import annotations

PES_PER_CARD = 8
FUSIBLE = (1, 2, 4, 8)
"""How many PEs of a card work as one; they are aligned to their number."""
CARD_NBYTES = 48 * 10**9
PE_NBYTES = CARD_NBYTES // PES_PER_CARD
"""Memory of one PE."""
PE_BYTES_PER_S = 1.5e12 / PES_PER_CARD
"""Memory bandwidth of one PE."""
