"""Polynomials in named sizes, as shape arithmetic computes them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

_BEYOND_INT64 = 2**63
Monomial = tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Polynomial:
    """A polynomial in named sizes: sorted monomials with coefficients that are not zero."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(terms: Mapping[Monomial, int]) -> Polynomial:
        """The polynomial with these terms."""
        return Polynomial(tuple(sorted((m, c) for m, c in terms.items() if c)))

    @staticmethod
    def constant(number: int) -> Polynomial:
        """The polynomial that is a number."""
        return Polynomial.of({(): number})

    def number(self) -> int | None:
        """The value if the polynomial is a number, else None."""
        if not self.terms:
            return 0
        return self.terms[0][1] if len(self.terms) == 1 and not self.terms[0][0] else None

    def __add__(self, other: Polynomial) -> Polynomial:
        terms = dict(self.terms)
        for monomial, coefficient in other.terms:
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return Polynomial.of(terms)

    def __neg__(self) -> Polynomial:
        return Polynomial.of({m: -c for m, c in self.terms})

    def __sub__(self, other: Polynomial) -> Polynomial:
        return self + -other

    def __mul__(self, other: Polynomial) -> Polynomial:
        terms: dict[Monomial, int] = {}
        for (m, c), (n, d) in itertools.product(self.terms, other.terms):
            key = tuple(sorted(m + n))
            terms[key] = terms.get(key, 0) + c * d
        return Polynomial.of(terms)

    def equals(self, other: Polynomial) -> bool | None:
        """Whether two sizes are equal, whatever the names stand for (0 or more); None if that depends on them."""
        difference = self - other
        if not difference.terms:
            return True
        coefficients = [c for _, c in difference.terms]
        offset = dict(difference.terms).get((), 0)
        same_sign = all(c > 0 for c in coefficients) or all(c < 0 for c in coefficients)
        return False if offset and same_sign else None

    def exceeds(self, other: Polynomial) -> bool | None:
        """Whether this size is greater than the other, whatever the names stand for; None if that depends on them."""
        difference = dict((self - other).terms)
        if all(c > 0 for c in difference.values()) and difference.get((), 0) > 0:
            return True
        return False if all(c < 0 for c in difference.values()) else None
