"""Builds a contender by its name. Its framework is imported only then, and no other one.

A process of PyTorch does not import JAX, nor one of JAX PyTorch: memory is measured too.
"""

from benchmarks.contenders.step import Step
from benchmarks.models.cases import Case


def build(contender: str, case: Case) -> Step:
    """The contender, built.

    Raises:
      KeyError: if there is no contender of this name.
      ImportError: if what it needs is not installed.
    """
    if contender == "attention":
        from benchmarks.contenders import attention

        return attention.make(case)
    if contender.startswith(("torch", "peft")):
        from benchmarks.contenders import pytorch

        return pytorch.CONTENDERS[contender](case)
    if contender.startswith("serve"):
        from benchmarks.contenders import serving

        return serving.CONTENDERS[contender](case)
    from benchmarks.contenders import problems, training

    return training.make_step(problems.PROBLEMS[contender](case), case)
