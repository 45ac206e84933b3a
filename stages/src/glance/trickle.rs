//! Never lets an upload fall silent.
//!
//! While the image is emitted from what is kept, bytes flow. While parts of it are read again, there may be none for a minute: a GET
//! discards up to the first extent that is wanted, or passes gigabytes of zeros. Servers and proxies cut an upload that is
//! silent for 60 s. So the last bytes of what there is are held back, and given out in drops until more come.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use engine::{Inlet, Outlet, Stage, StageContext, StageError};

use crate::{
    extent::Chunk,
    units::{to_u64, to_usize},
};

/// Bytes held back while more are to come: drops of 8 KiB every few seconds last for hours.
pub const RESERVE_BYTES: u64 = 16 << 20;
/// One drop. Some proxies ask for 500 bytes a second.
const DROP_BYTES: usize = 8 << 10;

/// Passes chunks on, but for the last [`RESERVE_BYTES`], which it gives out in drops while nothing comes; at the end of its input it
/// gives out everything. Not needed where nothing is read again.
pub struct Trickle {
    /// The longest silence.
    pub every: Duration,
}

impl Stage for Trickle {
    type In = Chunk;
    type Out = Chunk;
    type Report = ();

    async fn run(self, inlet: Inlet<Chunk>, outlet: Outlet<Chunk>, _: StageContext) -> Result<(), StageError> {
        let mut held: VecDeque<Bytes> = VecDeque::new();
        let mut held_bytes = 0;
        loop {
            // cancel-safe: what is not received stays in the port
            match tokio::time::timeout(self.every, inlet.recv()).await {
                Ok(received) => {
                    let Some(Chunk(chunk)) = received? else { break };
                    held_bytes += to_u64(chunk.len());
                    held.push_back(chunk);
                    while held_bytes > RESERVE_BYTES
                        && let Some(mut first) = held.pop_front()
                    {
                        let over = to_usize(held_bytes - RESERVE_BYTES).min(first.len());
                        let out = first.split_to(over);
                        held_bytes -= to_u64(out.len());
                        if !first.is_empty() {
                            held.push_front(first);
                        }
                        outlet.send(Chunk(out)).await?;
                    }
                }
                Err(_) => {
                    let Some(mut first) = held.pop_front() else { continue };
                    let out = first.split_to(first.len().min(DROP_BYTES));
                    held_bytes -= to_u64(out.len());
                    if !first.is_empty() {
                        held.push_front(first);
                    }
                    outlet.send(Chunk(out)).await?;
                }
            }
        }
        for chunk in held {
            outlet.send(Chunk(chunk)).await?;
        }
        outlet.finish();
        Ok(())
    }
}
