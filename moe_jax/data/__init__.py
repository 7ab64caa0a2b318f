"""From files to batches: documents, tokens, packed rows, a resumable stream.

The order of the rooms is `sources` (and `corpus`, the embedded default) -> `tokenizer`, `chat` -> `tokenized`
(token ids on disk, by `token_store` in a bucket) -> `packing` (rows) -> `pipeline` (mixture, shuffle, batches);
`origin` says what changed under a resumed run. Everything is NumPy; nothing here touches a device.
"""
