//! A batch inside a program of your own: raw images of one project, two at a time, each event a line.
//!
//!     OS_CLOUD=mycloud cargo run -p virta-stages --example batch -- web-1 web-2

use std::{num::NonZeroUsize, sync::Arc};

use engine::CancelToken;
use stages::{
    batch::{Batch, Event, Listing, Plan, Request, run::Limits},
    convert::Options,
    openstack::{CloudConfig, CloudFlags, Session, config::Environment},
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let requests: Vec<Request> = std::env::args().skip(1).map(|name| Request::of(&name)).collect();
    let session = Session::sign_in(CloudConfig::resolve(&CloudFlags::default(), &Environment::current())?).await?;
    // all together take no more than these
    let options = Options { memory_bytes: 512 << 20, ..Options::default() };
    let listing = Listing::of_project(&session).await?;
    let plan = Plan::make(&session, listing, requests, &options, "{name}-qcow2", None)?;
    let names: Vec<String> = plan.entries.iter().map(stages::batch::Entry::shown).collect();
    let listener = Arc::new(move |event: &Event<'_>| {
        if let Event::Ended { index, outcome, .. } = event {
            println!("{}: {} {}", names[*index], outcome.word(), outcome.why().unwrap_or_default());
        }
    });
    let limits = Limits { jobs: NonZeroUsize::new(2).ok_or("two is not zero")?, ..Limits::default() };
    let (cancel, journal) = (CancelToken::new(), None);
    let summary = Batch { session, plan, options, limits, journal, listener, cancel }.run().await?;
    println!("{} bytes became {}", summary.converted_bytes, summary.made_bytes);
    std::process::exit(summary.exit_code().into());
}
