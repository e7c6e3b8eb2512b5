//! Refusals of a full store, and making room.

use std::collections::VecDeque;

use crate::consumer::dead_letter::answer::{DeadLetterPolicy, WhenFull, WriteRefused};
use crate::consumer::dead_letter::format;
use crate::consumer::dead_letter::tests::{Op, archive, id, letter, open_with, write};
use crate::event::Key;
use crate::testing::FaultyStorage;

#[test]
fn a_full_store_refuses_the_whole_batch_and_accepts_more_when_there_is_room() {
    let disk = FaultyStorage::new();
    let mut letters = open_with(&disk, DeadLetterPolicy::default().letters_max(2)).expect("opens");
    write(&mut letters, &[Op::Park(1, 10), Op::Park(1, 20)]).expect("room");
    let files = disk.files();
    let refused = write(&mut letters, &[Op::Skip(3, 30), Op::Park(2, 40)]);
    assert!(matches!(refused, Err(WriteRefused::Full)), "{refused:?}");
    assert!(disk.files() == files && !letters.index.knows(id(3, 30)));
    write(&mut letters, &[Op::Skip(3, 30)]).expect("a skipped event takes no room");
    write(&mut letters, &[Op::Handle(1, 10), Op::Park(2, 40)]).expect("one letter ends and one begins");
    assert_eq!(letters.len(), 2);
    let bytes = letters.statistics().bytes;
    assert_eq!(bytes, letters_bytes(&[20, 40]));
}

fn letters_bytes(offsets: &[u64]) -> u64 {
    offsets.iter().map(|&at| format::letter_bytes(&letter(1, at, "no answer"), &archive(at)) as u64).sum()
}

#[test]
fn the_bytes_of_letters_are_bounded() {
    let policy = DeadLetterPolicy::default().bytes_max(4 << 10);
    let mut letters = open_with(&FaultyStorage::new(), policy).expect("opens");
    let refused = (0..).find(|&offset| write(&mut letters, &[Op::Park(1, offset)]).is_err()).expect("some time");
    let all: Vec<u64> = (0..=refused).collect();
    assert!(letters_bytes(&all) > 4 << 10 && letters_bytes(&all[..all.len() - 1]) <= 4 << 10);
    assert_eq!(letters.statistics().bytes, letters_bytes(&all[..all.len() - 1]));
}

#[test]
fn the_oldest_letters_make_room_and_each_is_reported_and_counted() {
    let disk = FaultyStorage::new();
    let policy = DeadLetterPolicy::default().letters_max(100).when_full(WhenFull::DiscardOldest);
    let mut letters = open_with(&disk, policy.clone()).expect("opens");
    let mut discarded = Vec::new();
    let (mut expected, mut present) = (Vec::new(), VecDeque::new());
    for offset in 0..600_u64 {
        // The younger key has the lower number, so the age differs from the order of the index.
        let key = 600 - offset / 3;
        match offset % 50 {
            20 => letters = open_with(&disk, policy.clone()).expect("opens"),
            30 => letters.compact().expect("compacted"),
            35 => {
                disk.fail_sync(1);
                write(&mut letters, &[Op::Park(key, offset)])
                    .expect_err("the letters that it would have discarded stay the oldest");
            }
            40 => {
                let (key, at) = present.remove(present.len() / 2).expect("some");
                write(&mut letters, &[Op::Handle(key, at)]).expect("written");
            }
            _ => {}
        }
        discarded.extend(write(&mut letters, &[Op::Park(key, offset)]).expect("written").overflowed);
        present.push_back((key, offset));
        if present.len() > 100 {
            let (key, at) = present.pop_front().expect("some");
            expected.push((Key(key), id(key, at)));
        }
    }
    assert_eq!(discarded, expected);
    let s = open_with(&disk, policy).expect("opens").statistics();
    assert_eq!((s.letters, s.parked, s.handled), (100, 600, 12));
    assert_eq!((s.discarded, s.overflowed), (488, 488));
}

#[test]
fn a_batch_larger_than_the_limit_is_refused_and_discards_nothing() {
    let policy = DeadLetterPolicy::default().letters_max(2).when_full(WhenFull::DiscardOldest);
    let mut letters = open_with(&FaultyStorage::new(), policy).expect("opens");
    write(&mut letters, &[Op::Park(1, 1), Op::Park(1, 2)]).expect("room");
    let refused = write(&mut letters, &[Op::Park(2, 3), Op::Park(2, 4), Op::Park(2, 5)]);
    assert!(matches!(refused, Err(WriteRefused::Full)));
    assert_eq!(letters.letters_of(Key(1)), 2);
    let written = write(&mut letters, &[Op::Park(2, 3)]).expect("room is made");
    assert_eq!(written.overflowed, [(Key(1), id(1, 1))], "the oldest first, also after a refusal");
}

#[test]
fn a_letter_discarded_to_make_room_is_not_offered_again() {
    let disk = FaultyStorage::new();
    let policy = DeadLetterPolicy::default().letters_max(1).when_full(WhenFull::DiscardOldest);
    let mut letters = open_with(&disk, policy.clone()).expect("opens");
    write(&mut letters, &[Op::Park(1, 10)]).expect("room");
    let written = write(&mut letters, &[Op::Park(2, 20)]).expect("room is made");
    assert_eq!(written.overflowed, [(Key(1), id(1, 10))]);
    for compacts in [false, true] {
        if compacts {
            letters.compact().expect("compacted");
        }
        assert!(letters.has(Key(1), id(1, 10)) && !letters.waits(Key(1), id(1, 10)));
        letters = open_with(&disk, policy.clone()).expect("opens");
        assert!(letters.has(Key(1), id(1, 10)) && !letters.waits(Key(1), id(1, 10)));
    }
}
