"""Private names of Lightning's command line: apart, because its import takes jsonargparse's."""

from collections.abc import Mapping

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

CHECKED = ">=2.6,<2.7"


class OpenCLI(LightningCLI):
    """`LightningCLI` that reads no configuration from checkpoints, with public names for its steps.

    Lightning would let a checkpoint's configuration win over the command line, and no argument
    turns that off.
    """

    def subcommand_parser(self) -> LightningArgumentParser:
        """The parser of the command that is run; the public `parser` is that of all commands."""
        return self._parser(self.subcommand)

    def subcommand_parsers(self) -> Mapping[str, LightningArgumentParser]:
        """The parser of each command, as soon as there are any."""
        return self._subcommand_parsers

    def run_subcommand(self, subcommand: str) -> None:
        """Run the command; called when all is built."""
        super()._run_subcommand(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        pass
