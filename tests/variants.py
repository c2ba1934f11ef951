"""Variants of the literature, written from their equations against the public interface."""

import dataclasses

import jax
import jax.numpy as jnp

import lora_jax


class FixedMagnitude(lora_jax.Variant):
    """DoRA whose magnitudes stay those of W: W' = ||W||_c (W + s U V) / ||W + s U V||_c."""

    name = "fixed_magnitude"

    def shapes(self, d, k, r):
        return {"U": (d, r), "V": (r, k)}

    def init(self, key, W, rule):
        U, V = self.init_factors(key, W, rule)
        return {"U": U, "V": V}

    def normal_form(self, W, s, U, V):
        norm = lora_jax.column_norm(W + s * U @ V)
        return lora_jax.NormalForm(lora_jax.column_norm(W) / jnp.where(norm > 0, norm, 1), U, V)


@dataclasses.dataclass(frozen=True)
class VeRA(lora_jax.Variant):
    """VeRA (Kopiczko et al. 2024): W' = W + s (A diag(d)) (B diag(b)), A and B random for all."""

    seed: int = 0
    d_initial: float = 0.1

    name = "vera"

    def shapes(self, d, k, r):
        return {"lambda_d": (r,), "lambda_b": (k,)}

    def init(self, key, W, rule):
        return {"lambda_d": jnp.full(rule.rank, self.d_initial), "lambda_b": jnp.zeros(W.shape[1])}

    def shared(self, d, k, r):
        a, b = jax.random.split(jax.random.key(self.seed))
        return jax.random.normal(a, (d, r)) / d**0.5, jax.random.normal(b, (r, k)) / r**0.5

    def normal_form(self, W, s, lambda_d, lambda_b):
        A, B = self.shared(*W.shape, len(lambda_d))
        return lora_jax.NormalForm(None, A * lambda_d, B * lambda_b)


class LoHa(lora_jax.Variant):
    """LoHa (Hyeon-Woo et al. 2022): W' = W + s (U1 V1) * (U2 V2), elementwise."""

    name = "loha"

    def shapes(self, d, k, r):
        return {"U1": (d, r), "V1": (r, k), "U2": (d, r), "V2": (r, k)}

    def init(self, key, W, rule):
        keys = jax.random.split(key, 3)
        shapes = self.shapes(*W.shape, rule.rank)
        random = dict(zip(("V1", "U2", "V2"), keys, strict=True))
        arrays = {name: jax.random.normal(key, shapes[name]) for name, key in random.items()}
        return arrays | {"U1": jnp.zeros(shapes["U1"])}

    def kernel(self, W, s, U1, V1, U2, V2):
        return W + s * (U1 @ V1) * (U2 @ V2)


class LoKr(lora_jax.Variant):
    """LoKr (Yeh et al. 2024): W' = W + s kron(A, B), with factors of no rank."""

    name = "lokr"

    def shapes(self, d, k, r):
        a, b = (max(i for i in range(1, 1 + int(n**0.5)) if n % i == 0) for n in (d, k))
        return {"A": (a, b), "B": (d // a, k // b)}

    def init(self, key, W, rule):
        shapes = self.shapes(*W.shape, rule.rank)
        return {"A": jax.random.normal(key, shapes["A"]), "B": jnp.zeros(shapes["B"])}

    def kernel(self, W, s, A, B):
        return W + s * jnp.kron(A, B)


class IA3(lora_jax.Variant):
    """IA3 (Liu et al. 2022): W' = W diag(l)."""

    name = "ia3"

    def shapes(self, d, k, r):
        return {"l": (k,)}

    def init(self, key, W, rule):
        return {"l": jnp.ones(W.shape[1])}

    def normal_form(self, W, s, l):  # noqa: E741
        return lora_jax.NormalForm(a=l)


class PiSSA(lora_jax.LoRA):
    """PiSSA (Meng et al. 2024): LoRA that starts as the r largest singular vectors of W."""

    name = "pissa"

    def init(self, key, W, rule):
        U, S, V = jnp.linalg.svd(W, full_matrices=False)
        root = jnp.sqrt(S[: rule.rank] / rule.scale)
        return {"U": U[:, : rule.rank] * root, "V": root[:, None] * V[: rule.rank]}

    def base(self, W, s, U, V):
        return W - s * U @ V


class Rotation(lora_jax.Variant):
    """OFT (Qiu et al. 2023), of one block: W' = Q W, with the Q of Cayley."""

    name = "rotation"

    def shapes(self, d, k, r):
        return {"R": (1, d, d)}

    def init(self, key, W, rule):
        return {"R": jnp.zeros(self.shapes(*W.shape, 1)["R"])}

    def kernel(self, W, s, R):
        eye, skew = jnp.eye(R.shape[-1]), R - R.swapaxes(-1, -2)
        Q = jnp.linalg.solve(eye - skew, eye + skew)
        return (Q @ W[None])[0]


PROOFS = {v.name: v for v in (FixedMagnitude(), VeRA(), LoHa())}
MORE = {v.name: v for v in (LoKr(), IA3(), PiSSA())}
