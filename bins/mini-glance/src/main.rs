//! mini-glance as a program.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, ValueEnum};
use mini_glance::{Config, MiniGlance, Ranges};

/// A small Identity and Image service on loopback, for trying things without a cloud.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Port on 127.0.0.1; 0 takes a free one
    #[arg(long, default_value_t = 9292)]
    port: u16,
    /// Folder for image data [default: a new one, removed at the end]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Seconds that a token lives
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    token_life: u64,
    /// How ranged downloads are answered
    #[arg(long, value_enum, default_value = "served")]
    ranges: RangesChoice,
    /// Uploaded images get no hashes, as after a direct Ceph snapshot
    #[arg(long)]
    null_hashes: bool,
    /// Uploads are refused with 413 when half of them has come
    #[arg(long)]
    quota_hit_mid_body: bool,
    /// Uploaded images stay in `saving`
    #[arg(long)]
    stuck_saving: bool,
    /// Uploads are refused with 415 at their end
    #[arg(long)]
    refuse_format: bool,
    /// So many downloads are cut off
    #[arg(long, value_name = "N", default_value_t = 0)]
    cut_gets: u32,
    /// So many uploads are cut off
    #[arg(long, value_name = "N", default_value_t = 0)]
    cut_puts: u32,
    /// Bytes after which they are
    #[arg(long, value_name = "BYTES", default_value_t = 10 << 20)]
    cut_after: u64,
    /// A running server of this name, for `virta snapshot` (may be repeated)
    #[arg(long, value_name = "NAME")]
    server: Vec<String>,
    /// Milliseconds before each answer
    #[arg(long, value_name = "MS", default_value_t = 0)]
    latency: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum RangesChoice {
    /// 206, as a file store does
    Served,
    /// 400, as Ceph, Swift and S3 stores do
    Refused,
    /// 200 with everything
    Ignored,
    /// 206 with the image's first bytes
    FirstBytes,
    /// 206 with another range in its header
    WrongContentRange,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let config = Config { port: cli.port, store: cli.store, token_life: Duration::from_secs(cli.token_life), temporary_in: None };
    let mut service = match MiniGlance::start(config).await {
        Ok(service) => service,
        Err(error) => {
            use std::error::Error;
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            eprintln!("mini-glance: {error}{cause}");
            return ExitCode::FAILURE;
        }
    };
    service.faults(|faults| {
        faults.ranges = match cli.ranges {
            RangesChoice::Served => Ranges::Served,
            RangesChoice::Refused => Ranges::Refused,
            RangesChoice::Ignored => Ranges::Ignored,
            RangesChoice::FirstBytes => Ranges::FirstBytes,
            RangesChoice::WrongContentRange => Ranges::WrongContentRange,
        };
        faults.null_hashes = cli.null_hashes;
        faults.quota_hit_mid_body = cli.quota_hit_mid_body;
        faults.stuck_saving = cli.stuck_saving;
        faults.refuse_format = cli.refuse_format;
        faults.cut_gets = cli.cut_gets;
        faults.cut_puts = cli.cut_puts;
        faults.cut_after_bytes = cli.cut_after;
        faults.latency = Duration::from_millis(cli.latency);
    });
    if !cli.server.is_empty() {
        let record =
            serde_json::json!({ "name": "base", "disk_format": "qcow2", "container_format": "bare", "visibility": "shared" });
        let made = service.add_image(&record, |storing| storing.write(b"QFI\xfb\0\0\0\x03"));
        let Ok(image) = made else {
            eprintln!("mini-glance: the image that the servers were built from could not be stored");
            return ExitCode::FAILURE;
        };
        for name in &cli.server {
            service.add_server(name, &image);
        }
    }
    println!("# mini-glance at {}; a clouds.yaml for it:\n{}", service.base(), service.two_clouds_yaml());
    // its folder goes with it, whoever ends it
    let terminated = async {
        match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
            Ok(mut signal) => _ = signal.recv().await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = service.wait() => ExitCode::FAILURE,
        _ = tokio::signal::ctrl_c() => ExitCode::SUCCESS,
        () = terminated => ExitCode::SUCCESS,
    }
}
