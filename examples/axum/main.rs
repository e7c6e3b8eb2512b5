//! A game server with axum; README.md says how to start and use it.
mod game;
use std::{collections::HashMap, fmt::Display, sync::Arc, time::Duration};

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, Query, State};
use axum::{Json, Router, http::HeaderMap, http::StatusCode, response::Response, routing::get, routing::put};
use corelane::error::{LiveError, WhoseFault};
use corelane::{CommandError, Config, Engine, Key, SharedClient, SharedProducer, Time, event::deserialize, log::Live};
use game::{GameEvent, Player};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::{net::TcpListener, sync::watch, task::spawn_blocking, time::timeout};

const LIMIT: Duration = Duration::from_secs(5);
type AppState = State<Arc<App>>;
type Failed = (StatusCode, Json<Value>);
type Answer = Result<Json<Value>, Failed>;

struct App {
    engine: Engine<Player>,
    client: SharedClient<Player>,
    producer: SharedProducer<GameEvent>,
    stop: watch::Sender<bool>,
}

fn failed(error: impl WhoseFault + Display) -> Failed {
    let status = match (error.is_client_error(), error.is_retryable()) {
        (true, _) => StatusCode::UNPROCESSABLE_ENTITY,
        (_, true) => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (status, Json(json!({ "error": error.to_string() })))
}

async fn publish(State(app): AppState, Path(id): Path<u64>, Json((x, y)): Json<(f64, f64)>) -> Result<(), Failed> {
    app.producer.publish(Key::new(id), GameEvent::Moved(x, y)).await.map_err(failed)
}

async fn command(State(app): AppState, Path(id): Path<u64>, headers: HeaderMap, Json(coins): Json<i64>) -> Answer {
    let mut sending = app.client.send(Key::new(id), coins).durable();
    if let Some(once) = headers.get("idempotency-key") {
        sending = sending.once(&*String::from_utf8_lossy(once.as_bytes()));
    }
    match timeout(LIMIT, sending).await {
        Ok(Ok(outcome)) => Ok(Json(json!({ "version": outcome.version.get(), "repeated": outcome.repeated }))),
        Ok(Err(CommandError::Rejected(refused))) => Err((StatusCode::CONFLICT, Json(json!({ "refused": refused })))),
        Ok(Err(error)) if !error.is_outcome_unknown() => Err(failed(error)),
        // It may still be carried out. With an idempotency key, it is safe to send it again.
        Ok(Err(_)) | Err(_) => Err((StatusCode::GATEWAY_TIMEOUT, Json(json!({ "error": "no answer" })))),
    }
}

async fn player(State(app): AppState, Path(id): Path<u64>, Query(query): Query<HashMap<String, u64>>) -> Answer {
    let Some(&ms) = query.get("at") else {
        let (player, version) = app.engine.state(Key::new(id)).await.map_err(failed)?.unwrap_or_default();
        return Ok(Json(json!({ "player": player, "version": version.get() })));
    };
    let past = spawn_blocking(move || app.engine.state_at(Key::new(id), Time::end_of_ms(ms)));
    let past = past.await.expect("reading history does not panic").map_err(failed)?;
    Ok(Json(json!({ "player": past.state, "version": past.version.get() })))
}

async fn live(State(app): AppState, Path(id): Path<u64>, upgrade: WebSocketUpgrade) -> Result<Response, Failed> {
    let feed = app.engine.live().key(Key::new(id)).start().map_err(failed)?;
    let stop = app.stop.subscribe();
    Ok(upgrade.on_upgrade(|socket| forward(socket, feed, stop)))
}

async fn forward(mut socket: WebSocket, mut feed: Live<GameEvent>, mut stop: watch::Receiver<bool>) {
    loop {
        let text = tokio::select! {
            next = feed.next_async() => match next {
                Ok(Some(record)) => json!(deserialize::<GameEvent>(record.event).ok()),
                Err(LiveError::Lagged { missed, .. }) => json!({ "missed": missed }),
                Ok(None) | Err(_) => break,
            },
            message = socket.recv() => if let Some(Ok(_)) = message { continue } else { return },
            _ = stop.changed() => break,
        };
        if socket.send(Message::text(text.to_string())).await.is_err() {
            return;
        }
    }
    drop(socket.send(Message::Close(None)).await);
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (dir, address) = (args.next().unwrap_or("target/axum".into()), args.next().unwrap_or("127.0.0.1:3000".into()));
    let (listener, mut terminate) = (TcpListener::bind(address).await?, signal(SignalKind::terminate())?);
    let engine = Engine::<Player>::open(Config::new(dir).shards(2))?; // Blocks, but nothing else runs yet.
    let (client, producer, stop) = (engine.shared_client(), engine.shared_producer(), watch::Sender::new(false));
    let app = Arc::new(App { engine, client, producer, stop });
    let router = Router::new()
        .route("/players/{id}", get(player).post(command))
        .route("/players/{id}/position", put(publish))
        .route("/players/{id}/live", get(live))
        .route("/metrics", get(async |State(app): AppState| app.engine.metrics(Duration::ZERO).prometheus()))
        .with_state(Arc::clone(&app));
    eprintln!("listening on {}", listener.local_addr()?);
    let mut stop = app.stop.subscribe();
    let server = axum::serve(listener, router).with_graceful_shutdown(async move { drop(stop.changed().await) });
    let server = tokio::spawn(server.into_future());
    terminate.recv().await;
    app.stop.send_replace(true); // No new connections; requests in progress get their answers.
    let _late = timeout(LIMIT, async { tokio::join!(server, app.stop.closed()) }).await;
    spawn_blocking(move || app.engine.shutdown(LIMIT)).await??;
    Ok(())
}
