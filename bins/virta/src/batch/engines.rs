//! Files and commands for engines that run many tasks on many machines. Virta schedules nothing there itself.

use std::{
    fs, io,
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use clap::ValueEnum;
use stages::{
    batch::{Plan, Request},
    convert::After,
    error::JobError,
    reporter::Reporter,
    text::{printable, shell_word},
};

use super::BatchArgs;
use crate::{display::Display, exit};

/// An engine that exists.
#[derive(Clone, Copy, ValueEnum, PartialEq, Eq, Debug)]
pub enum Engine {
    /// HyperQueue: one task an image, out of a JSON file
    Hyperqueue,
    /// Slurm: one array task an image
    Slurm,
}

/// Flags that each task gets: those that say how, none that say what.
fn task_flags(arguments: &BatchArgs) -> Vec<String> {
    let dropped = [
        "--from",
        "--all-snapshots",
        "--all-users",
        "--larger-than",
        "--older-than",
        "--name",
        "--instance",
        "--plan",
        "--plan-dir",
        "--name-template",
        "--jobs",
        "--journal",
        "--max-failures",
        "--progress",
        "--report",
        "--format",
        "--dry-run",
        "--yes",
    ];
    let mut flags = super::summary::typed_flags(&dropped);
    if !flags.iter().any(|flag| flag.starts_with("--os-cloud"))
        && let Some(cloud) = arguments.cloud.os_cloud.clone().or_else(|| std::env::var("OS_CLOUD").ok())
    {
        flags.extend(["--os-cloud".to_owned(), cloud]);
    }
    flags
}

/// The program's own path: workers are other machines, but mostly with the same folders.
fn program() -> String {
    std::env::current_exe().map_or_else(|_| "virta".to_owned(), |path| path.display().to_string())
}

fn quoted(words: &[String]) -> String {
    words.iter().map(|word| shell_word(word)).collect::<Vec<_>>().join(" ")
}

/// Writes a file for its owner alone; there may be a plan from before.
fn write_file(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())
}

/// Writes the files of a plan, and prints the command that submits it.
pub fn write(engine: Engine, arguments: &BatchArgs, plan: &Plan, display: &Display) -> Result<(), JobError> {
    let requests: Vec<Request> = plan
        .entries
        .iter()
        .filter(|entry| entry.is_work())
        .map(|entry| Request {
            // by id, and with the name that was planned: tasks run later, and elsewhere
            image: entry.image.as_ref().map_or_else(|| entry.request.image.clone(), |image| image.id.clone()),
            name: Some(entry.new_name.clone()),
            ..entry.request.clone()
        })
        .collect();
    for entry in plan.entries.iter().filter(|entry| !entry.is_work()) {
        display.note(&format!("not in the plan: {}: {}", entry.shown(), why(&entry.verdict)));
    }
    if requests.is_empty() {
        return Err(JobError::Refused("there is nothing to convert, so there is no plan".to_owned()));
    }
    let mut words = Vec::new();
    // where clouds.yaml is; what is in it has to be there on each machine
    if let Ok(config) = std::env::var("OS_CLIENT_CONFIG_FILE") {
        words.extend(["env".to_owned(), format!("OS_CLIENT_CONFIG_FILE={config}")]);
    }
    words.extend([program(), "batch".to_owned(), "--task-from-env".to_owned()]);
    words.extend(task_flags(arguments));
    if plan.entries.iter().any(|entry| entry.is_work() && entry.options.after != After::Keep) {
        if !arguments.source_after.yes {
            return Err(JobError::Usage(
                "the tasks of this plan would delete images, and nobody can be asked then: add --yes if that is meant".to_owned(),
            ));
        }
        words.push("--yes".to_owned());
    }
    let folder = &arguments.plan_dir;
    let failed = |error: io::Error| JobError::Refused(format!("writing the plan into {}: {error}", folder.display()));
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let folder = folder.canonicalize().map_err(failed)?;
    let cpus = arguments.conversion.tuning.workers.map_or(2, std::num::NonZeroUsize::get);
    let submit = match engine {
        Engine::Hyperqueue => {
            let items = folder.join("items.json");
            let text = serde_json::to_string_pretty(&requests).unwrap_or_default() + "\n";
            write_file(&items, &text, 0o600).map_err(failed)?;
            // --task-dir is what makes HyperQueue look for the error text
            let mut hq: Vec<String> =
                ["hq", "submit", "--name", "virta", "--task-dir", "--crash-limit", "5", "--cpus"].map(str::to_owned).into();
            hq.extend([cpus.to_string(), "--from-json".to_owned(), items.display().to_string()]);
            if let Some(most) = arguments.max_failures {
                hq.extend(["--max-fails".to_owned(), most.to_string()]);
            }
            let submit = format!("{} -- {}", quoted(&hq), quoted(&words));
            write_file(&folder.join("submit.sh"), &format!("#!/bin/sh\nexec {submit}\n"), 0o700).map_err(failed)?;
            display.note(&format!("{} tasks in {}", requests.len(), items.display()));
            display.note("what failed: hq job task-ids last --filter failed; why: hq task list last --filter failed; again, what is done stays done: the same command");
            submit
        }
        Engine::Slurm => {
            let items = folder.join("items.jsonl");
            let text: String = requests.iter().map(|request| serde_json::to_string(request).unwrap_or_default() + "\n").collect();
            write_file(&items, &text, 0o600).map_err(failed)?;
            words.extend(["--from".to_owned(), items.display().to_string()]);
            let script = folder.join("virta.sbatch");
            write_file(&script, &slurm_script(requests.len(), arguments.jobs.get(), cpus, &quoted(&words)), 0o700)
                .map_err(failed)?;
            display.note(&format!("{} tasks in {}, {} at once", requests.len(), items.display(), arguments.jobs));
            display.note(
                "what failed: sacct -j JOB --state FAILED -o JobID,ExitCode; again, what is done stays done: the same command",
            );
            quoted(&["sbatch".to_owned(), script.display().to_string()])
        }
    };
    _ = exit::print(&submit);
    Ok(())
}

fn why(verdict: &stages::batch::Verdict) -> String {
    match verdict {
        stages::batch::Verdict::Skip { reason } | stages::batch::Verdict::Fail { reason } => printable(reason),
        _ => "converted already".to_owned(),
    }
}

/// An array task an image. Exit code 75 puts it into the queue again, three times at most.
fn slurm_script(tasks: usize, at_once: usize, cpus: usize, command: &str) -> String {
    format!(
        "#!/bin/bash\n\
         #SBATCH --job-name=virta\n\
         #SBATCH --array=1-{tasks}%{at_once}\n\
         #SBATCH --cpus-per-task={cpus}\n\
         #SBATCH --requeue\n\
         #SBATCH --open-mode=append\n\
         # --mem, --time, --account and --partition are this site's: sbatch takes them on the command line, too\n\
         {command}\n\
         code=$?\n\
         # 75: worth another try\n\
         if [ \"$code\" -eq 75 ] && [ \"${{SLURM_RESTART_COUNT:-0}}\" -lt 3 ] && command -v scontrol > /dev/null; then\n\
         \x20   exec scontrol requeue \"$SLURM_JOB_ID\"\n\
         fi\n\
         exit \"$code\"\n"
    )
}
