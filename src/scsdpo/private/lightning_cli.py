"""Private names of Lightning's command line; a module of its own, as its import is slow."""

from collections.abc import Mapping

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

CHECKED = ">=2.6,<2.7"


class OpenCLI(LightningCLI):
    """`LightningCLI` that reads no configuration from checkpoints, with public names for its steps.

    Lightning lets a checkpoint's configuration override the command line, and no argument turns
    that off.
    """

    def subcommand_parser(self) -> LightningArgumentParser:
        """The parser of the current command; the public `parser` is that of all commands."""
        return self._parser(self.subcommand)

    def subcommand_parsers(self) -> Mapping[str, LightningArgumentParser]:
        """Command -> its parser, once they are built."""
        return self._subcommand_parsers

    def run_subcommand(self, subcommand: str) -> None:
        """Run the command; called when all objects are built."""
        super()._run_subcommand(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        pass
