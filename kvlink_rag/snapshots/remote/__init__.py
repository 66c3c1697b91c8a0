"""A tier of snapshots that machines share, behind the local store."""

from .places import place_of as place_of
from .tier import RemoteStats as RemoteStats
from .tier import RemoteTier as RemoteTier
from .tier import note_erasure as note_erasure
from .tier import open_remote as open_remote
