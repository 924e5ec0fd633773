"""Whose signatures Nix believes on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.errors import BadInput
from cachesrv.nix.signing import PublicKey
from cachesrv.push import nix_conf, nix_conf_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_NIXOS_KEY = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="


def trusted_by_nix(environ: Mapping[str, str]) -> Iterable[PublicKey]:
    """The keys in nix.conf, of the machine and of the user. Raises ConfigError for files that cannot be read."""
    files = [nix_conf_files.system_files(environ)]
    if environ.get("HOME") or environ.get("XDG_CONFIG_HOME"):
        files.append(nix_conf_files.user_files(environ))
    lines = [line for file in files for line in nix_conf_files.lines(file.conf)]
    for word in nix_conf.words(lines, nix_conf.KEYS, [_NIXOS_KEY]):
        try:
            yield PublicKey.parse(word)
        except BadInput:
            continue
