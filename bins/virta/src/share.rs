//! Sharing: `virta share`, `unshare`, `members`; and on the other side `accept`, `reject`.

use std::process::ExitCode;

use clap::Args;
use reqwest::StatusCode;
use serde_json::json;
use stages::{
    error::JobError,
    openstack::{Image, Session, image::ImageError, member::is_project_id},
    ownership::refuse_unmarked,
    reporter::Reporter,
    text::{printable, shell_word},
};

use crate::{
    flags::CloudArgs,
    image_names::image_names,
    in_cloud::in_cloud,
    table::{Cell, Column, ListFlags, ListFormat, print_rows},
};
use stages::{openstack::marks::SOURCE_ID, text::counted};

#[derive(Args)]
#[command(after_help = "\
A member can read the image by its id at once, before it has accepted; accepting puts it into its lists. The image stays this project's: \
it pays for it, and when it deletes it, it is gone for all.
PROJECT is a project's id (openstack project show -f value -c id NAME), or the name of one of your own projects.")]
pub struct ShareArgs {
    /// A name or an id
    #[arg(add = image_names())]
    pub image: String,
    /// Projects to share it with
    #[arg(required = true, value_name = "PROJECT")]
    pub projects: Vec<String>,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

#[derive(Args)]
pub struct UnshareArgs {
    /// A name or an id
    #[arg(add = image_names())]
    pub image: String,
    /// Projects to share it with no more
    #[arg(required = true, value_name = "PROJECT")]
    pub projects: Vec<String>,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

#[derive(Args)]
pub struct MembersArgs {
    /// A name or an id
    #[arg(add = image_names())]
    pub image: String,
    #[command(flatten)]
    pub cloud: CloudArgs,
    #[command(flatten)]
    pub list: ListFlags,
}

#[derive(Args)]
#[command(after_help = "Images that wait for an answer: virta image list --shared")]
pub struct AnswerArgs {
    /// The image's id, or its name if only one of that name is shared with this project
    #[arg(add = image_names())]
    pub image: String,
    #[command(flatten)]
    pub cloud: CloudArgs,
}

/// `virta share`.
pub async fn share(arguments: ShareArgs) -> ExitCode {
    in_cloud(&arguments.cloud, async |session, display, _| {
        let image = own_image(session, &arguments.image).await?;
        refuse_unmarked(session, &image)?;
        let projects = projects(session, &arguments.projects).await?;
        if image.status != "active" {
            display.warn(&format!("the image is {}: until it is active there is nothing to read", image.status));
        }
        match image.visibility.as_deref() {
            Some("shared") => {}
            Some("private") | None => {
                display.note(&format!("image {} is private: it becomes shared first", image.shown()));
                session.set_property(&image.id, "visibility", &json!("shared")).await?;
            }
            Some(other) => {
                return Err(JobError::Refused(format!(
                    "image {} is {other}: every project can read it already, so it has no members",
                    image.shown()
                )));
            }
        }
        if let Some(handed_out) = what_is_handed_out(&image) {
            display.warn(&handed_out);
        }
        let members = session.members(&image.id).await?;
        for project in &projects {
            if members.contains(project) {
                display.note(&format!("{} is shared with project {} already", image.shown(), printable(project)));
                continue;
            }
            session.add_member(&image.id, project).await?;
            display.note(&format!(
                "shared {} with project {}, if there is one of that id: Glance does not ask. It can read it from now on",
                image.shown(),
                printable(project)
            ));
        }
        let id = image.shown_id();
        display.note(&format!(
            "in the other project, to have it in lists: virta accept {id} (or: openstack image set --accept {id})"
        ));
        display.note(&format!("to take it back here: virta unshare {id} {}", shell_word(&projects[0])));
        Ok(())
    })
    .await
}

/// `virta unshare`.
pub async fn unshare(arguments: UnshareArgs) -> ExitCode {
    in_cloud(&arguments.cloud, async |session, display, _| {
        let image = own_image(session, &arguments.image).await?;
        refuse_unmarked(session, &image)?;
        let members = session.members(&image.id).await?;
        // a member that was added by a wrong name has to go by that name
        let mut wanted = Vec::new();
        for project in &arguments.projects {
            match members.contains(project) {
                true => wanted.push(project.clone()),
                false => wanted.append(&mut projects(session, std::slice::from_ref(project)).await?),
            }
        }
        for project in &wanted {
            match session.remove_member(&image.id, project).await? {
                true => display.note(&format!("image {} is no longer shared with project {}", image.shown(), printable(project))),
                false => display.note(&format!("image {} was not shared with project {}", image.shown(), printable(project))),
            }
        }
        display.note("what was made of it there, servers and copies, stays as it is");
        Ok(())
    })
    .await
}

/// `virta members`.
pub async fn members(arguments: MembersArgs) -> ExitCode {
    const COLUMNS: [Column; 4] = [
        Column { key: "member_id", heading: "Project", usual: true, right: false },
        Column { key: "status", heading: "Status", usual: true, right: false },
        Column { key: "created_at", heading: "Shared at (UTC)", usual: true, right: false },
        Column { key: "updated_at", heading: "Answered at (UTC)", usual: false, right: false },
    ];
    in_cloud(&arguments.cloud, async |session, display, _| {
        let image = session.find_image(&arguments.image).await?;
        let members = session.memberships(&image.id).await?;
        let row = |member: &stages::openstack::member::Member| {
            vec![
                Cell::plain(member.member_id.clone()),
                Cell::plain(member.status.clone()),
                Cell::plain(member.created_at.clone()),
                Cell::plain(member.updated_at.clone()),
            ]
        };
        let rows: Vec<Vec<Cell>> = members.iter().map(row).collect();
        print_rows(&COLUMNS, &rows, &arguments.list)?;
        if arguments.list.format == ListFormat::Table {
            let visibility = image.visibility.as_deref().unwrap_or("private");
            display.note(&format!("image {} is {visibility}, with {}", image.shown(), counted(members.len(), "member")));
        }
        Ok(())
    })
    .await
}

/// `virta accept` and `virta reject`.
pub async fn answer(arguments: AnswerArgs, status: &'static str) -> ExitCode {
    in_cloud(&arguments.cloud, async |session, display, _| {
        let image = shared_image(session, &arguments.image).await?;
        match session.answer_sharing(&image.id, status).await {
            Err(error) if error.status() == Some(StatusCode::NOT_FOUND) => {
                return Err(JobError::Refused(format!(
                    "image {} is not shared with project {}: virta image list --shared shows what is",
                    image.shown_id(),
                    session.whoami().project
                )));
            }
            other => other?,
        }
        let now = match status {
            "accepted" => "is in this project's lists from now on",
            _ => "is out of this project's lists; its id still reads it until its owner takes it back",
        };
        display.note(&format!("{status}: image {} ({}) {now}", image.shown(), image.shown_id()));
        Ok(())
    })
    .await
}

/// An image of this project: no other can share it.
async fn own_image(session: &Session, name: &str) -> Result<Image, JobError> {
    let image = session.find_image(name).await?;
    if image.owner.is_some() && image.owner != session.whoami().project_id {
        return Err(JobError::Refused(format!(
            "image {} ({}) belongs to project {}: only its owner can share it. A copy of it is yours: virta convert glance:{} glance:NAME",
            image.shown(),
            image.shown_id(),
            printable(image.owner.as_deref().unwrap_or_default()),
            image.shown_id()
        )));
    }
    Ok(image)
}

/// Ids of projects: Glance takes any string, and shares with nobody then.
async fn projects(session: &Session, wanted: &[String]) -> Result<Vec<String>, JobError> {
    let mut own = None;
    let mut ids = Vec::new();
    for text in wanted {
        let id = if is_project_id(text) {
            text.clone()
        } else {
            let own: &Vec<(String, String)> = match &mut own {
                Some(own) => own,
                empty => empty.insert(session.own_projects().await),
            };
            let named: Vec<&String> = own.iter().filter(|(_, name)| name == text).map(|(id, _)| id).collect();
            match named.as_slice() {
                [id] => (*id).clone(),
                [] => {
                    return Err(JobError::Usage(format!(
                        "{} is no project's id, and none of your own projects is called so. The other side finds its id with: openstack project show -f value -c id NAME",
                        printable(text)
                    )));
                }
                several => {
                    return Err(JobError::Usage(format!(
                        "{} of your projects are called {}: give an id",
                        several.len(),
                        printable(text)
                    )));
                }
            }
        };
        if Some(&id) == session.whoami().project_id.as_ref() {
            return Err(JobError::Usage(format!("{} is this project itself, which has the image already", printable(text))));
        }
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

/// An image by its id, or by its name among those that are shared with this project, whatever was answered.
async fn shared_image(session: &Session, name: &str) -> Result<Image, JobError> {
    let name = name.strip_prefix("glance:").unwrap_or(name);
    match session.find_image(name).await {
        Err(ImageError::NotFound { .. }) => {}
        other => return Ok(other?),
    }
    let all = session.images_matching(&[("visibility", "shared"), ("member_status", "all"), ("name", name)]).await?;
    let mut found: Vec<Image> = all.into_iter().filter(|image| image.name.as_deref() == Some(name)).collect();
    match found.len() {
        1 => Ok(found.remove(0)),
        0 => Err(JobError::Usage(format!(
            "no image {} is shared with this project: virta image list --shared shows what is",
            printable(name)
        ))),
        _ => {
            let ids = found.into_iter().map(|image| image.id).collect();
            Err(JobError::Image(ImageError::Ambiguous { name: printable(name), ids }))
        }
    }
}

/// What members get to see that is in no file of the disk.
fn what_is_handed_out(image: &Image) -> Option<String> {
    match image.disk_format.as_deref() {
        Some("iso") => None,
        Some("raw") => Some(
            "a raw image is the whole disk: remains of deleted files are in it, too, and a member can read them, as well as keys and passwords in \
             files that are there"
                .to_owned(),
        ),
        _ if image.property(SOURCE_ID).is_none() => {
            Some("an image is a whole disk: a member can read all files in it, keys and passwords included".to_owned())
        }
        _ => Some(
            "an image that was converted exactly still has the remains of deleted files in it, and a member can read them, as well as keys and \
             passwords in files that are there"
                .to_owned(),
        ),
    }
}
