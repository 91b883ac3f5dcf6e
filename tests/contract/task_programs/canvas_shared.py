"""A shared task. Every app of a process that imports this has it, so only workers do."""

from petiole.coordination.coordinated import coordinated_task


@coordinated_task(lock="canvas:{tag}", name="shared")
def shared(number: int, tag: str) -> int:
    """As the others."""
    return number * 2
