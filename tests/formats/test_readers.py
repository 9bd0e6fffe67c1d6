"""The table of programs that read adapters."""

from phicore.formats.readers import READERS, REMEDIES


def test_every_reader_names_what_it_does_with_known_features():
    for reader in READERS.values():
        assert reader.unread.keys() <= REMEDIES.keys()
