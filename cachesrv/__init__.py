"""cachesrv: a Nix binary cache. `cachesrv serve` answers Nix clients over HTTP, `cachesrv push` fills it.

The map. A line imports only lines below it; names joined by `|` do not import each other (import-linter keeps it).

    cli                            one file a command; heavy imports inside the command
    wiring                         Config -> stores -> services -> fronts: the only place that picks
    web | push                     aiohttp server | uploader (push knows nothing of the server's insides)
    services                       use cases over the three base protocols
    storage | index | catalog      objects by key | hash part -> answer | SQL
    config | telemetry | systemd
    pack | turns | budget          the form of many small NARs on the wire | how many requests at once | and bytes
    limits                         those of the kernel, in words (beside pack)
    api                            wire structs of the push API, written once, used by web and push
    nix                            formats and protocols of Nix: pure, no network, no event loop
    errors                         everything raised on purpose

Three ideas carry it. The object store holds a standard binary cache, that any Nix client can read without us, and
every other store can be rebuilt from it. A lookup is one read of a memory-mapped index. A path becomes visible in
one place, last: NAR, then listing, then narinfo, then catalog, then index, then the acknowledgement.
"""
