//! Every transport that this machine has, through the public seam: the same promises for each.
//!
//! Verbs takes part wherever there is an RDMA device (in the lab there is one).

#![allow(clippy::unwrap_used)] // helpers of tests, where a panic is the report

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use postcopy_transport::{
    AnyLane, Completion, EndpointOptions, Exporter, HostMemory, Importer, Lane, LaneError, Read, ReadError,
    RemoteRegion, Token, Transport,
};

const MEMORY: usize = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(20);

/// Two ends on one host, with one lane.
struct Pair {
    exporter: Exporter,
    source: HostMemory,
    landing: HostMemory,
    importer: Importer,
    lane: AnyLane,
}

fn available() -> Vec<Transport> {
    let known = Transport::ALL.into_iter();
    known
        .filter(|transport| match transport.available() {
            Ok(()) => true,
            Err(error) => {
                println!("not on this machine: {error}");
                false
            }
        })
        .collect()
}

fn stream_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

/// Bytes that differ by position, over all of memory.
fn filled(len: usize) -> (HostMemory, Vec<u8>) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    let memory = HostMemory::anonymous("test", len).unwrap();
    assert!(memory.write(0, &bytes));
    (memory, bytes)
}

fn add_lane(exporter: &mut Exporter, importer: &Importer, transport: Transport) -> AnyLane {
    let (request, blob) = importer.request().unwrap();
    let grant = exporter.grant(&blob).unwrap();
    let stream = transport.needs_stream().then(|| {
        let (ours, theirs) = stream_pair();
        exporter.attach(theirs).unwrap();
        ours
    });
    importer.connect(request, &grant, stream).unwrap()
}

fn pair(transport: Transport) -> (Pair, Vec<u8>) {
    let (source, bytes) = filled(MEMORY);
    let landing = HostMemory::anonymous("landing", MEMORY).unwrap();
    let options = EndpointOptions::default();
    let mut exporter = Exporter::new(transport, std::slice::from_ref(&source), &options).unwrap();
    let importer = Importer::new(transport, std::slice::from_ref(&landing), &options).unwrap();
    let lane = add_lane(&mut exporter, &importer, transport);
    (Pair { exporter, source, landing, importer, lane }, bytes)
}

impl Pair {
    fn read(&self, token: u64, from: u64, to: u64, len: u32) -> Read {
        self.read_by(self.exporter.regions()[0], token, from, to, len)
    }

    fn read_by(&self, region: RemoteRegion, token: u64, from: u64, to: u64, len: u32) -> Read {
        let local = self.importer.regions()[0].slice(to, len).unwrap();
        Read::new(Token(token), local, region.slice(from, len).unwrap()).unwrap()
    }
}

/// Waits for `count` completions.
fn collect(lane: &mut AnyLane, count: usize) -> Result<Vec<Completion>, LaneError> {
    let begin = Instant::now();
    let mut done = Vec::new();
    while done.len() < count {
        assert!(begin.elapsed() < PATIENCE, "{} of {count} completions", done.len());
        lane.poll(&mut done)?;
    }
    Ok(done)
}

#[test]
fn every_byte_arrives_in_its_place_at_any_size_and_order() {
    for transport in available() {
        let (mut pair, bytes) = pair(transport);
        let sizes = [1u32, 8, 63, 4096, 4096 + 17, 65536, 1 << 20];
        let mut target = 0u64;
        let mut expected = vec![0u8; MEMORY];
        let mut reads = Vec::new();
        for (index, size) in sizes.iter().cycle().take(21).enumerate() {
            let from = (index as u64 * 123_457) % (MEMORY as u64 - u64::from(*size));
            if target + u64::from(*size) > MEMORY as u64 {
                break;
            }
            reads.push(pair.read(index as u64, from, target, *size));
            let (from, to, len) = (from as usize, target as usize, *size as usize);
            expected[to..to + len].copy_from_slice(&bytes[from..from + len]);
            target += u64::from(*size) + 11;
        }
        assert_eq!(pair.lane.post(&reads).unwrap(), reads.len(), "{transport}");
        let mut tokens: Vec<u64> = collect(&mut pair.lane, reads.len())
            .unwrap()
            .into_iter()
            .map(|completion| {
                completion.result.unwrap();
                completion.token.0
            })
            .collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..reads.len() as u64).collect::<Vec<_>>(), "{transport}");
        let mut landed = vec![0u8; MEMORY];
        assert!(pair.landing.read(0, &mut landed));
        assert!(landed == expected, "{transport}: bytes outside or inside the targets differ");
    }
}

#[test]
fn a_lane_takes_as_many_reads_as_it_has_room_for() {
    for transport in available() {
        let (mut pair, _) = pair(transport);
        let reads: Vec<Read> = (0..200).map(|i| pair.read(i, i * 4096, i * 4096, 4096)).collect();
        let room = pair.lane.room();
        assert!(room > 0 && room < 200, "{transport}: {room}");
        let accepted = pair.lane.post(&reads).unwrap();
        assert_eq!(accepted, room, "{transport}");
        assert_eq!(pair.lane.post(&reads[accepted..]).unwrap(), pair.lane.room().min(200 - accepted));
        let done = collect(&mut pair.lane, accepted).unwrap();
        assert!(done.len() >= accepted, "{transport}");
    }
}

#[test]
fn an_armed_lane_wakes_its_sleeper() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    for transport in available().into_iter().filter(|transport| *transport != Transport::Shm) {
        let (mut pair, _) = pair(transport);
        let mut done = Vec::new();
        for round in 0..200 {
            let read = pair.read(round, round * 4096, 0, 4096);
            assert_eq!(pair.lane.post(&[read]).unwrap(), 1);
            while done.is_empty() {
                if pair.lane.arm().unwrap() {
                    let mut waited = [PollFd::from_borrowed_fd(pair.lane.descriptor(), PollFlags::IN)];
                    let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
                    let ready = poll(&mut waited, Some(&timeout)).unwrap();
                    assert_eq!(ready, 1, "{transport}: slept through a completion in round {round}");
                }
                pair.lane.poll(&mut done).unwrap();
            }
            assert_eq!(done.pop().unwrap().token, Token(round));
        }
    }
}

#[test]
fn a_wrong_key_fails_the_read_and_other_lanes_go_on() {
    for transport in available() {
        let (mut pair, _) = pair(transport);
        let mut other = add_lane(&mut pair.exporter, &pair.importer, transport);
        let (stranger, _) = filled(MEMORY);
        let strange =
            Exporter::new(transport, &[stranger.clone(), stranger], &EndpointOptions::default()).unwrap();
        let wrong = strange.regions()[1];
        let read = pair.read_by(wrong, 1, 0, 0, 4096);
        pair.lane.post(&[read]).unwrap();
        match collect(&mut pair.lane, 1) {
            Ok(done) => assert_eq!(done[0].result, Err(ReadError::Refused), "{transport}"),
            Err(error) => assert!(error.to_string().contains("remote access"), "{transport}: {error}"),
        }
        let read = pair.read(2, 0, 0, 4096);
        other.post(&[read]).unwrap();
        collect(&mut other, 1).unwrap().pop().unwrap().result.unwrap();
    }
}

#[test]
fn an_exporter_that_goes_away_ends_its_tcp_lanes() {
    let (mut pair, _) = pair(Transport::Tcp);
    let read = pair.read(1, 0, 0, 4096);
    drop(pair.exporter);
    let posted = pair.lane.post(&[read]).and_then(|_| collect(&mut pair.lane, 1).map(drop));
    assert!(matches!(posted, Err(LaneError::Closed | LaneError::Io(_))), "{posted:?}");
}

#[test]
fn a_shm_importer_cannot_write_what_it_was_given() {
    let (pair, _) = pair(Transport::Shm);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let shared: Vec<&str> = maps.lines().filter(|line| line.contains("/memfd:test")).collect();
    assert!(shared.iter().any(|line| line.contains("r--s")), "the peer's view is read-only: {shared:?}");
    drop(pair);
}

/// What a TCP lane says to a server that answers a read with `answer`.
fn lane_against(answer: Vec<u8>) -> Result<Vec<Completion>, LaneError> {
    let (pair, _) = pair(Transport::Tcp);
    let (ours, mut theirs) = stream_pair();
    let (request, _) = pair.importer.request().unwrap();
    let mut lane = pair.importer.connect(request, &[], Some(ours)).unwrap();
    lane.post(&[pair.read(5, 0, 0, 64)]).unwrap();
    let mut asked = [0u8; 32];
    theirs.read_exact(&mut asked).unwrap();
    theirs.write_all(&answer).unwrap();
    drop(theirs);
    collect(&mut lane, 2)
}

#[test]
fn a_malicious_server_ends_the_lane_and_nothing_else() {
    let header = |tag: u64, status: u32, len: u32| {
        let mut bytes = tag.to_le_bytes().to_vec();
        bytes.extend(status.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend([0xee; 64]);
        bytes
    };
    for (answer, expected) in [
        (header(6, 0, 64), "out of order"),
        (header(5, 0, 65), "wrong length"),
        (header(5, 9, 64), "unknown status"),
        (header(5, 0, u32::MAX), "wrong length"),
        (header(5, 0, 64)[..40].to_vec(), "closed"),
        (vec![], "closed"),
    ] {
        let error = lane_against(answer).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} / {expected}");
    }
}

#[test]
fn a_malicious_client_is_cut_off_and_the_exporter_serves_on() {
    let (mut pair, _) = pair(Transport::Tcp);
    let frame = |opcode: u32, len: u32, addr: u64| {
        let mut bytes = opcode.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(addr.to_le_bytes());
        bytes
    };
    for bad in [frame(2, 64, 0), frame(1, 0, 0), frame(1, u32::MAX, 0)] {
        let (mut ours, theirs) = stream_pair();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        pair.exporter.attach(theirs).unwrap();
        ours.write_all(&bad).unwrap();
        let mut answer = Vec::new();
        assert_eq!(ours.read_to_end(&mut answer).unwrap_or(0), 0, "{bad:?} was answered");
    }
    // Out of bounds with an unknown key is a refusal, padded to the length that was asked for.
    let (mut ours, theirs) = stream_pair();
    pair.exporter.attach(theirs).unwrap();
    ours.write_all(&frame(1, 200_000, u64::MAX)).unwrap();
    let mut answer = vec![0u8; 16 + 200_000];
    ours.read_exact(&mut answer).unwrap();
    assert_eq!(answer[8], 1);
    assert!(answer[16..].iter().all(|byte| *byte == 0));

    let read = pair.read(9, 0, 0, 4096);
    pair.lane.post(&[read]).unwrap();
    collect(&mut pair.lane, 1).unwrap();
    assert_eq!(pair.source.len(), MEMORY);
}

#[test]
fn a_device_that_is_not_there_is_named_in_the_error() {
    let options = EndpointOptions { device: Some("mlx9_9".into()), ..Default::default() };
    let (memory, _) = filled(4096);
    let error = Exporter::new(Transport::Verbs, &[memory], &options).err().unwrap().to_string();
    assert!(error.starts_with("transport verbs is not available here"), "{error}");
    if Transport::Verbs.available().is_ok() {
        assert!(error.contains("mlx9_9"), "{error}");
    }
}
