"""Versions, devices and available backends: ``python -m tal_fast.info``."""

from collections.abc import Sequence

from tal_fast import __version__
from tal_fast.utils.arguments import ArgumentParser
from tal_fast.utils.process import program_name, run_and_exit


def main(argv: Sequence[str] | None = None) -> None:
    """Print versions, devices, and for each device the backend that ``auto`` takes and why."""
    ArgumentParser(prog=program_name("info"), description="Print versions, devices and kernels.").parse_args(argv)
    # Imported here so that --help does not wait for PyTorch.
    from tal_fast.loss.dispatch import describe
    from tal_fast.utils.environment import describe as describe_environment

    print("\n".join([*describe_environment(__version__), *describe()]))


if __name__ == "__main__":
    run_and_exit(main)
