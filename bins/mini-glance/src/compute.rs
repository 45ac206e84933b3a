//! Servers, as Nova has them: their states, and what `virta snapshot` asks for.
//!
//! Statuses, task states and refusals are those of the Compute API reference (2.1 to 2.96) and of `nova/compute/api.py`:
//! `os-stop` from active or error, `os-start` from stopped alone, `createImage` from active, stopped, paused and suspended, each with no
//! task under way and not while the server is locked; 409 otherwise. `createImage` answers with an `image_id` from 2.45 on and
//! with a `Location` before. A snapshot that fails takes its image with it. A volume-backed server has `"image": ""`, and its snapshot is an
//! image of 0 bytes that points at volume snapshots.
//!
//! ```text
//! task:  image_snapshot_pending -> image_snapshot -> image_pending_upload -> image_uploading -> none
//! image: queued ---------------------------------------------------------> saving ----------> active
//! ```

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use hyper::{Method, Request, Response, StatusCode, body::Incoming, header::HeaderValue};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use crate::{
    answer::{Answer, Body, json as json_response},
    identity,
    server::{Shared, query, read_json},
};

/// The highest microversion that is answered.
const VERSION_MAX: u32 = 96;

/// A server.
#[derive(Clone, Debug)]
pub struct Server {
    /// Its id.
    pub id: String,
    /// Its name, which need not be unique.
    pub name: String,
    /// The image that it was built from; empty for one whose root disk is a volume.
    pub image: String,
    /// `active`, `stopped`, `paused`, `suspended`, `error`, …
    pub vm_state: &'static str,
    /// What is done with it just now.
    pub task_state: Option<&'static str>,
    /// Its project.
    pub project: &'static str,
    /// Nobody but an administrator may do anything with it.
    pub locked: bool,
    /// Volumes attached to it.
    pub volumes: Vec<String>,
    /// GiB of the flavor's ephemeral disk.
    pub ephemeral_gib: u64,
    /// What went wrong last.
    pub fault: Option<String>,
    /// The bytes of its disk.
    pub disk: Arc<Vec<u8>>,
    /// What was done with it: action, `Error` or nothing, and details.
    pub actions: Vec<(&'static str, Option<&'static str>, String)>,
}

impl Server {
    /// As the API shows it.
    #[must_use]
    pub fn status(&self) -> &'static str {
        match self.vm_state {
            "active" => "ACTIVE",
            "stopped" => "SHUTOFF",
            "paused" => "PAUSED",
            "suspended" => "SUSPENDED",
            "building" => "BUILD",
            "shelved_offloaded" => "SHELVED_OFFLOADED",
            "resized" => "VERIFY_RESIZE",
            _ => "ERROR",
        }
    }

    fn shown(&self, version: u32) -> Value {
        let image = if self.image.is_empty() { json!("") } else { json!({ "id": self.image, "links": [] }) };
        let flavor = if version >= 47 {
            json!({ "vcpus": 2, "ram": 4096, "disk": 80, "ephemeral": self.ephemeral_gib, "swap": 0, "original_name": "standard.small", "extra_specs": {} })
        } else {
            json!({ "id": "f", "links": [] })
        };
        let power = i32::from(matches!(self.vm_state, "active"));
        let mut shown = json!({
            "id": self.id, "name": self.name, "status": self.status(), "tenant_id": self.project, "user_id": identity::name_of(self.project), "metadata": {},
            "image": image, "flavor": flavor, "created": "2026-11-24T08:00:00Z", "updated": "2026-11-24T08:00:00Z",
            "OS-EXT-STS:task_state": self.task_state, "OS-EXT-STS:vm_state": self.vm_state, "OS-EXT-STS:power_state": power,
            "os-extended-volumes:volumes_attached": self.volumes.iter().map(|id| json!({ "id": id })).collect::<Vec<_>>(),
        });
        if version >= 9 {
            shown["locked"] = json!(self.locked);
        }
        // shown only in these states, whatever went wrong before (nova/api/openstack/compute/views/servers.py)
        if let (Some(fault), "ERROR") = (&self.fault, self.status()) {
            shown["fault"] = json!({ "code": 500, "created": "2026-11-24T08:00:00Z", "message": fault });
        }
        shown
    }
}

/// How the service behaves; all zero and false is a good day.
#[derive(Clone, Debug)]
pub struct Behaviour {
    /// Microversions are not known: as an old or a hidden service.
    pub no_microversions: bool,
    /// How long a guest takes to stop.
    pub stopping: Duration,
    /// How long each step of a snapshot takes.
    pub step: Duration,
    /// Snapshots fail in their third step: Nova deletes the image.
    pub failing_snapshots: u32,
    /// Snapshots whose compute host dies: the image stays queued, the task stays.
    pub dying_snapshots: u32,
    /// A failed snapshot leaves the server suspended.
    pub leaves_suspended: bool,
    /// Somebody starts each server as soon as it has stopped.
    pub restarts: bool,
    /// So many `os-stop` are acted upon and answered with 503.
    pub lost_stops: u32,
    /// So many `createImage` lose their answer, after they were acted upon.
    pub lost_answers: u32,
    /// So many actions get 503 first.
    pub failing_actions: u32,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            no_microversions: false,
            stopping: Duration::from_millis(20),
            step: Duration::from_millis(20),
            failing_snapshots: 0,
            dying_snapshots: 0,
            leaves_suspended: false,
            restarts: false,
            lost_stops: 0,
            lost_answers: 0,
            failing_actions: 0,
        }
    }
}

/// All servers, by id.
#[derive(Debug, Default)]
pub struct Compute {
    /// The servers.
    pub servers: BTreeMap<String, Server>,
    /// How the service behaves.
    pub behaviour: Behaviour,
}

impl Compute {
    /// Adds a running server of the first project; returns its id.
    pub fn add(&mut self, name: &str, image: &str) -> String {
        let id = Uuid::new_v4().hyphenated().to_string();
        let server = Server {
            id: id.clone(),
            name: name.to_owned(),
            image: image.to_owned(),
            vm_state: "active",
            task_state: None,
            project: identity::PROJECT_ID,
            locked: false,
            volumes: Vec::new(),
            ephemeral_gib: 0,
            fault: None,
            disk: Arc::new(vec![7; 3 << 20]),
            actions: Vec::new(),
        };
        self.servers.insert(id.clone(), server);
        id
    }

    fn set(&mut self, id: &str, change: impl FnOnce(&mut Server)) {
        if let Some(server) = self.servers.get_mut(id) {
            change(server);
        }
    }
}

/// An error as Nova words it.
fn error(status: StatusCode, kind: &str, message: &str) -> Response<Body> {
    json_response(status, &json!({ kind: { "code": status.as_u16(), "message": message } }))
}

/// The microversion that is asked for: 2.1 without one.
fn version_of(request: &Request<Incoming>, behaviour: &Behaviour) -> Result<u32, Box<Response<Body>>> {
    if behaviour.no_microversions {
        return Ok(1);
    }
    let header = |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let asked = header("openstack-api-version").and_then(|text| text.strip_prefix("compute ").map(str::to_owned));
    let Some(asked) = asked.or_else(|| header("x-openstack-nova-api-version")) else { return Ok(1) };
    match asked.strip_prefix("2.").and_then(|minor| minor.parse::<u32>().ok()) {
        Some(minor @ 1..=VERSION_MAX) => Ok(minor),
        _ => Err(Box::new(error(
            StatusCode::NOT_ACCEPTABLE,
            "computeFault",
            &format!("Version {asked} is not supported by the API. Minimum is 2.1 and maximum is 2.{VERSION_MAX}."),
        ))),
    }
}

/// Everything below `/compute`.
pub(crate) async fn route(shared: &Arc<Shared>, request: Request<Incoming>, path: &[String], project: &'static str) -> Answer {
    let behaviour = shared.compute(|compute, _| compute.behaviour.clone());
    let version = match version_of(&request, &behaviour) {
        Ok(version) => version,
        Err(refusal) => return Ok(*refusal),
    };
    let segments: Vec<&str> = path.iter().map(String::as_str).collect();
    let no_server = |id: &str| error(StatusCode::NOT_FOUND, "itemNotFound", &format!("Instance {id} could not be found."));
    let of_project = |compute: &Compute, id: &str| compute.servers.get(id).filter(|server| server.project == project).cloned();
    match (request.method().clone(), segments.as_slice()) {
        (Method::GET, ["v2.1"]) => {
            let (max, min) = if behaviour.no_microversions { (String::new(), "") } else { (format!("2.{VERSION_MAX}"), "2.1") };
            let version = json!({ "id": "v2.1", "status": "CURRENT", "version": max, "min_version": min, "links": [] });
            Ok(json_response(StatusCode::OK, &json!({ "version": version })))
        }
        (Method::GET, ["v2.1", "servers"]) | (Method::GET, ["v2.1", "servers", "detail"]) => {
            let wanted = query(&request);
            let find = |key: &str| wanted.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
            let (image, name) = (find("image"), find("name"));
            let detail = segments.len() == 3;
            let servers = shared.compute(|compute, _| {
                let all = compute.servers.values().filter(|server| server.project == project);
                let of_image = all.filter(|server| image.as_ref().is_none_or(|image| *image == server.image));
                // a regular expression: what matches in the middle of a name is found, too
                let named = of_image.filter(|server| {
                    name.as_ref().is_none_or(|name| server.name.contains(name.trim_start_matches('^').trim_end_matches('$')))
                });
                let short = |server: &Server| json!({ "id": server.id, "name": server.name, "links": [] });
                named.map(|server| if detail { server.shown(version) } else { short(server) }).collect::<Vec<_>>()
            });
            Ok(json_response(StatusCode::OK, &json!({ "servers": servers })))
        }
        (Method::GET, ["v2.1", "servers", id]) => Ok(match shared.compute(|compute, _| of_project(compute, id)) {
            Some(server) => json_response(StatusCode::OK, &json!({ "server": server.shown(version) })),
            None => no_server(id),
        }),
        (Method::GET, ["v2.1", "flavors", "f"]) => {
            let ephemeral = shared.compute(|compute, _| compute.servers.values().map(|server| server.ephemeral_gib).max());
            let flavor = json!({ "id": "f", "name": "standard.small", "vcpus": 2, "ram": 4096, "disk": 80, "swap": "", "OS-FLV-EXT-DATA:ephemeral": ephemeral });
            Ok(json_response(StatusCode::OK, &json!({ "flavor": flavor })))
        }
        (Method::GET, ["v2.1", "servers", id, "os-instance-actions"]) => {
            let Some(server) = shared.compute(|compute, _| of_project(compute, id)) else { return Ok(no_server(id)) };
            // the latest first
            let shown = server.actions.iter().enumerate().rev().map(|(number, (action, message, _))| {
                json!({ "action": action, "message": message, "request_id": format!("req-{number}"), "start_time": "2026-11-24T08:00:00Z" })
            });
            Ok(json_response(StatusCode::OK, &json!({ "instanceActions": shown.collect::<Vec<_>>() })))
        }
        (Method::GET, ["v2.1", "servers", id, "os-instance-actions", number]) => {
            let Some(server) = shared.compute(|compute, _| of_project(compute, id)) else { return Ok(no_server(id)) };
            let number = number.strip_prefix("req-").and_then(|number| number.parse::<usize>().ok());
            let Some((action, message, details)) = number.and_then(|number| server.actions.get(number)).cloned() else {
                return Ok(error(StatusCode::NOT_FOUND, "itemNotFound", "Action not found."));
            };
            let mut event = json!({ "event": "compute_snapshot_instance", "result": message.unwrap_or("Success") });
            if version >= 84 {
                event["details"] = if details.is_empty() { Value::Null } else { json!(details) };
            }
            Ok(json_response(
                StatusCode::OK,
                &json!({ "instanceAction": { "action": action, "message": message, "events": [event] } }),
            ))
        }
        (Method::POST, ["v2.1", "servers", id, "action"]) => {
            let id = (*id).to_owned();
            let body = read_json(request).await?;
            if shared.compute(|compute, _| of_project(compute, &id)).is_none() {
                return Ok(no_server(&id));
            }
            if shared.compute(|compute, _| crate::Faults::take(&mut compute.behaviour.failing_actions)) {
                return Ok(error(StatusCode::SERVICE_UNAVAILABLE, "computeFault", "The server is currently unavailable."));
            }
            act(shared, &id, &body, version)
        }
        _ => Ok(error(StatusCode::NOT_FOUND, "itemNotFound", "The resource could not be found.")),
    }
}

/// POST /servers/ID/action.
fn act(shared: &Arc<Shared>, id: &str, body: &Value, version: u32) -> Answer {
    let Some((action, parameters)) = body.as_object().and_then(|body| body.iter().next()) else {
        return Ok(error(StatusCode::BAD_REQUEST, "badRequest", "There is no such action: None"));
    };
    let (allowed, task, ends_as): (&[&str], _, _) = match action.as_str() {
        "os-stop" => (&["active", "error"], "powering-off", "stopped"),
        "os-start" => (&["stopped"], "powering-on", "active"),
        "resume" => (&["suspended"], "resuming", "active"),
        "unpause" => (&["paused"], "unpausing", "active"),
        "createImage" => (&["active", "stopped", "paused", "suspended"], "image_snapshot_pending", ""),
        other => return Ok(error(StatusCode::BAD_REQUEST, "badRequest", &format!("There is no such action: {other}"))),
    };
    let refusal = shared.compute(|compute, _| {
        let server = compute.servers.get_mut(id)?;
        let conflict = |text: String| Some(error(StatusCode::CONFLICT, "conflictingRequest", &text));
        if server.locked {
            return conflict(format!("Instance {id} is locked"));
        }
        if let Some(task) = server.task_state {
            return conflict(format!("Cannot '{action}' instance {id} while it is in task_state {task}"));
        }
        if !allowed.contains(&server.vm_state) {
            return conflict(format!("Cannot '{action}' instance {id} while it is in vm_state {}", server.vm_state));
        }
        server.task_state = Some(task);
        None
    });
    if let Some(refusal) = refusal {
        return Ok(refusal);
    }
    if action == "createImage" {
        return create_image(shared, id, parameters, version);
    }
    let lost = action == "os-stop" && shared.compute(|compute, _| crate::Faults::take(&mut compute.behaviour.lost_stops));
    let (shared, id) = (Arc::clone(shared), id.to_owned());
    tokio::spawn(async move {
        let behaviour = shared.compute(|compute, _| compute.behaviour.clone());
        tokio::time::sleep(if ends_as == "stopped" { behaviour.stopping } else { behaviour.step }).await;
        shared.compute(|compute, _| {
            let ends_as = if compute.behaviour.restarts { "active" } else { ends_as };
            compute.set(&id, |server| {
                server.vm_state = ends_as;
                server.task_state = None;
            });
        });
    });
    if lost {
        return Ok(error(StatusCode::SERVICE_UNAVAILABLE, "computeFault", "The server is currently unavailable."));
    }
    Ok(accepted())
}

fn accepted() -> Response<Body> {
    crate::answer::empty(StatusCode::ACCEPTED)
}

/// The record that Nova makes, and the steps that fill it.
fn create_image(shared: &Arc<Shared>, id: &str, parameters: &Value, version: u32) -> Answer {
    let server = shared.compute(|compute, _| compute.servers.get(id).cloned());
    let Some(server) = server else { return Ok(error(StatusCode::NOT_FOUND, "itemNotFound", "Instance could not be found.")) };
    let mut record = Map::new();
    record.insert("name".to_owned(), parameters["name"].clone());
    for (key, value) in [
        ("visibility", json!("private")),
        ("disk_format", json!("raw")),
        ("container_format", json!("bare")),
        ("image_type", json!("snapshot")),
        ("instance_uuid", json!(id)),
        ("user_id", json!(identity::name_of(server.project))),
        ("owner_id", json!(server.project)),
        ("image_location", json!("snapshot")),
        ("image_state", json!("available")),
        ("base_image_ref", json!(server.image)),
        ("min_disk", json!(80)),
    ] {
        record.insert(key.to_owned(), value);
    }
    if let Some(metadata) = parameters["metadata"].as_object() {
        record.extend(metadata.clone());
    }
    let volume_backed = server.image.is_empty();
    if volume_backed {
        record.insert("block_device_mapping".to_owned(), json!("[{\"snapshot_id\": \"s\", \"source_type\": \"snapshot\"}]"));
    }
    let made = shared.compute(|compute, images| match images.create(&Value::Object(record), server.project) {
        Ok(made) => Ok(made["id"].as_str().unwrap_or_default().to_owned()),
        Err(refusal) => {
            compute.set(id, |server| server.task_state = None);
            Err(*refusal)
        }
    });
    let image = match made {
        Ok(image) => image,
        Err(refusal) => return Ok(refusal),
    };
    tokio::spawn(snapshot(Arc::clone(shared), id.to_owned(), image.clone(), volume_backed));
    if shared.compute(|compute, _| crate::Faults::take(&mut compute.behaviour.lost_answers)) {
        return Err(std::io::Error::other("told to lose the answer"));
    }
    if version >= 45 {
        return Ok(json_response(StatusCode::ACCEPTED, &json!({ "image_id": image })));
    }
    let mut response = accepted();
    // an address inside the cloud: only its last part is of use
    if let Ok(value) = HeaderValue::from_str(&format!("http://glance.internal:9292/images/{image}")) {
        response.headers_mut().insert("location", value);
    }
    Ok(response)
}

async fn snapshot(shared: Arc<Shared>, id: String, image: String, volume_backed: bool) {
    let behaviour = shared.compute(|compute, _| compute.behaviour.clone());
    let end = |note: Option<&'static str>, details: &str| {
        shared.compute(|compute, _| {
            compute.set(&id, |server| {
                server.task_state = None;
                server.actions.push(("createImage", note, details.to_owned()));
            });
        });
    };
    if volume_backed {
        let _ = shared.store_image(&image, &[]);
        return end(None, "");
    }
    for task in ["image_snapshot", "image_pending_upload", "image_uploading"] {
        tokio::time::sleep(behaviour.step).await;
        shared.compute(|compute, _| compute.set(&id, |server| server.task_state = Some(task)));
        if task == "image_pending_upload" {
            if shared.compute(|compute, _| crate::Faults::take(&mut compute.behaviour.dying_snapshots)) {
                return; // the host is gone, and nobody sets anything right
            }
            if shared.compute(|compute, _| crate::Faults::take(&mut compute.behaviour.failing_snapshots)) {
                let reason = "Insufficient free space for image conversion on the host";
                shared.compute(|compute, images| {
                    images.0.remove(&image);
                    compute.set(&id, |server| {
                        server.fault = Some(reason.to_owned());
                        if behaviour.leaves_suspended {
                            server.vm_state = "suspended";
                        }
                    });
                });
                return end(Some("Error"), reason);
            }
        }
        // the image may be deleted by its owner: then Nova gives up, and that is all
        let gone = shared.compute(|_, images| match images.0.get_mut(&image) {
            Some(record) if task == "image_uploading" => {
                record.set("status", json!("saving"));
                false
            }
            Some(_) => false,
            None => true,
        });
        if gone {
            return end(Some("Error"), "Image not found during snapshot");
        }
    }
    tokio::time::sleep(behaviour.step).await;
    let disk = shared.compute(|compute, _| compute.servers.get(&id).map(|server| Arc::clone(&server.disk)));
    let stored = disk.is_some_and(|disk| shared.store_image(&image, &disk).unwrap_or(false));
    end(if stored { None } else { Some("Error") }, "");
}
