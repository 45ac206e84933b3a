//! What goes wrong for users, and what they are told: each error names what, where and what to do, and leaves nothing half made.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod common;

use std::{sync::Arc, time::Duration};

use common::{Cloud, MIB, Run};
use serde_json::json;
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};

async fn cloud() -> Cloud {
    Cloud::start_with(8, mini_glance::Config::default(), |_| {}).await
}

fn clouds(cloud: &Cloud, change: impl FnOnce(String) -> String) {
    std::fs::write(cloud.folder.path().join("clouds.yaml"), change(cloud.service.clouds_yaml())).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn sign_in_that_fails_says_why_and_what_to_do() {
    let cloud = cloud().await;
    clouds(&cloud, |text| text.replace("password: demo", "password: wrong"));
    for command in [&["doctor"][..], &["image", "list"], &["convert", "glance:snap", "glance:x"]] {
        cloud.run(command).await.ends(1, &["was refused: check user, password and project", "401", "POST /v3/auth/tokens"]);
    }
    clouds(&cloud, |_| String::new());
    std::fs::remove_file(cloud.folder.path().join("clouds.yaml")).unwrap();
    cloud.run(&["doctor"]).await.ends(2, &["no cloud is configured", "openrc"]);
    cloud.run(&["image", "list"]).await.ends(2, &["no cloud is configured", "clouds.yaml"]);
    clouds(&cloud, |text| text);
    cloud.run(&["image", "list", "--os-cloud", "nowhere"]).await.ends(2, &["nowhere", "mini"]);
    // a port that nobody listens at
    clouds(&cloud, |text| text.replace(cloud.service.base(), "http://127.0.0.1:9"));
    let run = cloud.run(&["image", "list"]).await;
    run.ends(1, &["signing in to mini at http://127.0.0.1:9/v3", "no answer"]);
    assert!(run.elapsed < Duration::from_secs(60), "{:?}", run.elapsed);
    cloud.run(&["doctor"]).await.ends(1, &["not signed in"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_cannot_be_used_are_told_apart() {
    let cloud = cloud().await;
    for command in [
        &["convert", "glance:none", "glance:x"][..],
        &["download", "none", "x.raw"],
        &["image", "show", "none"],
        &["inspect", "glance:none"],
        &["share", "none", "0123456789abcdef0123456789abcdef"],
        &["verify", "glance:none", "glance:snap"],
    ] {
        cloud.run(command).await.ends(2, &["there is no image none in this project", "virta image list"]);
    }
    let second = cloud.service.add_image(&common::snapshot_record("snap"), |storing| storing.write(&[1; 1000])).unwrap();
    for command in [
        &["convert", "glance:snap", "glance:x"][..],
        &["download", "snap", "x.raw"],
        &["image", "delete", "snap", "--yes"],
        &["inspect", "glance:snap"],
    ] {
        cloud.run(command).await.ends(2, &["there are 2 images called snap: use an id instead", &second, &cloud.snapshot]);
    }
    cloud.service.set(&second, "status", json!("deactivated"));
    for command in [&["convert"][..], &["download"], &["inspect"]] {
        let source = if command[0] == "download" { second.clone() } else { format!("glance:{second}") };
        let mut words = command.to_vec();
        words.push(&source);
        if command[0] != "inspect" {
            words.push("x.qcow2");
        }
        cloud.run(&words).await.ends(1, &["deactivated"]);
    }
    cloud.service.set(&second, "status", json!("active"));
    cloud.service.set(&second, "protected", json!(true));
    cloud.run(&["image", "delete", &second, "--yes"]).await.ends(1, &["is protected", "virta image set --unprotected"]);
    assert_eq!(cloud.service.images().len(), 2, "nothing was made, nothing was deleted");
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_carry_glances_words_and_the_request_id() {
    let cloud = cloud().await;
    std::fs::write(cloud.folder.path().join("disk.raw"), vec![5; 4 * MIB]).unwrap();
    cloud.service.faults(|faults| faults.refused_properties = vec!["description".to_owned()]);
    cloud
        .run(&["upload", "disk.raw", "new", "--description", "x", "--keep-format"])
        .await
        .ends(1, &["POST /v2/images: 403", "'description' is reserved", "request req-"]);
    cloud.service.faults(|faults| faults.quota_hit_mid_body = true);
    cloud.run(&["upload", "disk.raw", "new"]).await.ends(1, &["413", "exceeds the storage quota", "Make room"]);
    cloud.assert_nothing_made();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_ends_is_renewed_in_every_command() {
    let cloud = cloud().await;
    for command in [
        &["image", "list"][..],
        &["image", "show", "snap"],
        &["download", "snap", "disk.raw"],
        &["inspect", "glance:snap"],
        &["upload", "disk.raw", "again", "--keep-format", "--as-is"],
        &["share", "snap", "0123456789abcdef0123456789abcdef"],
        &["members", "snap"],
        &["doctor"],
    ] {
        cloud.service.faults(|faults| faults.expired_tokens = 1);
        cloud.run(command).await.ends(0, &[]);
        cloud.service.faults(|faults| assert_eq!(faults.expired_tokens, 0, "{command:?}"));
    }
    // one that cannot be renewed
    let base = cloud.service.base().to_owned();
    clouds(&cloud, |_| {
        format!(
            "clouds:\n  t:\n    auth_type: token\n    auth:\n      auth_url: {base}/v3\n      token: gone\n      project_id: p\n"
        )
    });
    cloud.run(&["image", "list"]).await.ends(1, &["was refused", "401"]);
}

/// The service behind TLS, with a certificate of an authority that no system knows.
async fn behind_tls(target: String) -> u16 {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls");
    let chain = vec![CertificateDer::from_pem_file(folder.join("server.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(folder.join("server.key")).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config.with_no_client_auth().with_single_cert(chain, key).unwrap()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, target) = (acceptor.clone(), target.clone());
            tokio::spawn(async move {
                let Ok(mut secure) = acceptor.accept(stream).await else { return };
                let Ok(mut plain) = tokio::net::TcpStream::connect(target).await else { return };
                let _ = tokio::io::copy_bidirectional(&mut secure, &mut plain).await;
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_nobody_knows_is_refused_until_its_authority_is_named() {
    let cloud = cloud().await;
    let port = behind_tls(cloud.service.base().trim_start_matches("http://").to_owned()).await;
    let secure = format!("https://localhost:{port}");
    clouds(&cloud, |text| {
        let text = text.replace(cloud.service.base(), &secure);
        text.replace("    region_name:", &format!("    image_endpoint_override: {secure}\n    region_name:"))
    });
    let said = |run: &Run| run.ends(1, &["no answer", "certificate", "UnknownIssuer"]).stderr.clone();
    let text = said(&cloud.run(&["image", "list"]).await);
    assert!(text.contains("--os-cacert"), "it says what helps: {text}");
    let authority = format!("{}/tests/fixtures/tls/ca.pem", env!("CARGO_MANIFEST_DIR"));
    cloud.run(&["image", "list", "--os-cacert", &authority]).await.ends(0, &["snap"]);
    cloud.run(&["download", "snap", "disk.raw", "--os-cacert", &authority]).await.ends(0, &["proven"]);
    cloud.run(&["image", "list", "--insecure"]).await.ends(0, &["snap", "certificates are not checked"]);
    let output = cloud.command(&["image", "list"]).env("OS_CACERT", &authority).output().await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    cloud.run(&["image", "list", "--os-cacert", "clouds.yaml"]).await.ends(2, &["clouds.yaml", "no certificate"]);
    cloud.run(&["image", "list", "--os-cacert", "nothing.pem"]).await.ends(2, &["nothing.pem", "No such file"]);
}
