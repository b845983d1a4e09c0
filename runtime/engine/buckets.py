"""Buckets, the sizes that the vendor compiles an artifact for: here, where any size runs, they are limits."""

from __future__ import annotations

from dataclasses import dataclass

from furiosa_llm.runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class Bucket:
    """`batch_size` sequences of at most `attention_size` tokens, of which `kv_cache_size` are in the cache."""

    batch_size: int
    attention_size: int
    kv_cache_size: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.attention_size < 1 or not 0 <= self.kv_cache_size < self.attention_size:
            raise InputError(
                f"{self}: expected a batch and an attention size of at least 1, and a KV cache size below the latter"
            )

    @property
    def input_ids_size(self) -> int:
        """The tokens that are not in the cache."""
        return self.attention_size - self.kv_cache_size


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketConfig:
    """The buckets that requests have to fit: the largest decode bucket bounds batches and sequences, the largest
    prefill bucket prompts.
    """

    prefill_buckets: tuple[Bucket, ...] = ()
    decode_buckets: tuple[Bucket, ...] = ()

    def __post_init__(self) -> None:
        if not self.decode_buckets:
            raise InputError(
                "decode_buckets must be given for generative models; give at least one, or no bucket_config"
            )

    @property
    def max_batch_size(self) -> int:
        """Of the decode buckets."""
        return max(bucket.batch_size for bucket in self.decode_buckets)

    @property
    def max_model_len(self) -> int:
        """The longest sequence of any bucket, in tokens."""
        return max(bucket.attention_size for bucket in (*self.prefill_buckets, *self.decode_buckets))

    @property
    def max_prompt_len(self) -> int | None:
        """The longest prompt that a prefill bucket takes, in tokens; None without one."""
        return max((bucket.attention_size for bucket in self.prefill_buckets), default=None)
