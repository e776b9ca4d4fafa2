"""What the programs say to each other: specs, Arrow schemas, codecs, wire, keys, bodies. No I/O, no torch."""
